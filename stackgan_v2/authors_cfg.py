"""Translate the StackGAN++ authors' configuration files into our flags."""
import argparse
import os

from common import authors_cfg
from common.errors import UserError
from common.flags import boolean

FLAGS = {
    'CONFIG_NAME': 'config_name', 'DATASET_NAME': 'dataset', 'CUDA': 'cuda', 'WORKERS': 'workers',
    'TREE.BRANCH_NUM': 'branches',
    'TRAIN.FLAG': 'train', 'TRAIN.NET_G': 'checkpoint', 'TRAIN.BATCH_SIZE': 'batch_size', 'TRAIN.MAX_EPOCH': 'epochs',
    'TRAIN.SNAPSHOT_INTERVAL': 'snapshot_interval', 'TRAIN.GENERATOR_LR': 'lr', 'TRAIN.DISCRIMINATOR_LR': 'lr',
    'TRAIN.COEFF.KL': 'kl_coef', 'TRAIN.COEFF.UNCOND_LOSS': 'uncond_coef', 'TRAIN.COEFF.COLOR_LOSS': 'color_coef',
    'GAN.EMBEDDING_DIM': 'embedding_dim', 'GAN.DF_DIM': 'df_dim', 'GAN.GF_DIM': 'gf_dim', 'GAN.Z_DIM': 'z_dim',
    'GAN.R_NUM': 'residuals', 'GAN.B_CONDITION': 'conditional',
    'TEST.B_EXAMPLE': 'example',
}
ONLY = {'TREE.BASE_SIZE': 64, 'TEXT.DIMENSION': 1024}  # the only values supported here
SPECIAL = ('DATA_DIR', 'GPU_ID', 'TRAIN.NET_D', 'TEST.SAMPLE_NUM')
IGNORED = ('EMBEDDING_TYPE', 'TRAIN.VIS_COUNT', 'GAN.NETWORK_TYPE')
KEYS = (*FLAGS, *ONLY, *SPECIAL, *IGNORED)
DEFAULTS = {'TRAIN.BATCH_SIZE': 64, 'TRAIN.COEFF.UNCOND_LOSS': 0.0}  # the authors' defaults, where ours differ
LSUN_CLASSES = {'church': 'church_outdoor_train', 'bedroom': 'bedroom_train'}


def translate(values, path):
    """Return ({flag: value}, list of ignored keys) for the authors' keys; nested keys are joined with dots.

    `path` is the file they come from, for messages. Raises UserError for a value that is not supported here.
    """
    flags, ignored = authors_cfg.translate(values, path, FLAGS, ONLY, IGNORED, DEFAULTS)
    if values.get('TRAIN.NET_D'):
        ignored.append('TRAIN.NET_D (netD0.pth, ... are read if they are beside NET_G)')
    if not _is_conditional(values, path):
        flags['count'] = values.get('TEST.SAMPLE_NUM')
    elif 'TEST.SAMPLE_NUM' in values:
        ignored.append('TEST.SAMPLE_NUM')
    return {**flags, **_data(values, _is_conditional(values, path))}, ignored


def _is_conditional(values, path):
    try:
        return boolean(values.get('GAN.B_CONDITION') or 'True')
    except argparse.ArgumentTypeError as error:
        raise UserError(f'{path}: GAN.B_CONDITION: {error}') from error


def _data(values, is_conditional):
    """Return the flags for DATA_DIR; like the authors' code, tell from its name what it holds."""
    folder = authors_cfg.data_folder(values)
    if not folder:
        return {}
    if 'lsun' in folder:
        if folder.endswith('_lmdb'):
            return {'lsun': os.path.dirname(folder), 'classes': [os.path.basename(folder).removesuffix('_lmdb')]}
        name = str(values.get('DATASET_NAME') or '')
        return {'lsun': folder, 'classes': [LSUN_CLASSES.get(name, name)]}
    if 'imagenet' in folder or not is_conditional:
        return {'image_folder': folder}
    return {'data_dir': folder}
