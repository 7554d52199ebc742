"""Translate the StackGAN authors' configuration files into our flags."""
from common import authors_cfg
from stackgan_v1.gan import SIZES

FLAGS = {
    'CONFIG_NAME': 'config_name', 'DATASET_NAME': 'dataset', 'CUDA': 'cuda', 'WORKERS': 'workers', 'STAGE': 'stage',
    'STAGE1_G': 'stage1', 'NET_G': 'checkpoint', 'Z_DIM': 'z_dim',
    'TRAIN.FLAG': 'train', 'TRAIN.BATCH_SIZE': 'batch_size', 'TRAIN.MAX_EPOCH': 'epochs',
    'TRAIN.SNAPSHOT_INTERVAL': 'snapshot_interval', 'TRAIN.LR_DECAY_EPOCH': 'lr_decay_epoch',
    'TRAIN.GENERATOR_LR': 'lr', 'TRAIN.DISCRIMINATOR_LR': 'lr', 'TRAIN.COEFF.KL': 'kl_coef',
    'GAN.CONDITION_DIM': 'condition_dim', 'GAN.DF_DIM': 'df_dim', 'GAN.GF_DIM': 'gf_dim', 'GAN.R_NUM': 'residuals',
}
SPECIAL = ('DATA_DIR', 'GPU_ID', 'IMSIZE', 'NET_D', 'TEXT.DIMENSION')
IGNORED = ('EMBEDDING_TYPE', 'VIS_COUNT', 'TRAIN.PRETRAINED_MODEL', 'TRAIN.PRETRAINED_EPOCH')
KEYS = (*FLAGS, *SPECIAL, *IGNORED)
DEFAULTS = {'STAGE': 1, 'TRAIN.LR_DECAY_EPOCH': 600}  # the authors' defaults, where ours depend on other flags


def translate(values, path):
    """Return ({flag: value}, list of ignored keys) for the authors' keys; nested keys are joined with dots.

    `path` is the file they come from, for messages. Raises UserError for a value that is not supported here.
    """
    only = {'TEXT.DIMENSION': 1024, 'IMSIZE': SIZES[1 if str(values.get('STAGE', 1)) == '1' else 2]}
    flags, ignored = authors_cfg.translate(values, path, FLAGS, only, IGNORED, DEFAULTS)
    if values.get('NET_D'):
        ignored.append('NET_D (netD_epoch_last.pth is read if it is beside NET_G)')
    return {**flags, 'data_dir': authors_cfg.data_folder(values)}, ignored
