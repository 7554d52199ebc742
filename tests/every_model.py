"""Create a small Model of every section, on any device, and a batch for it."""
import torch

import char_cnn_rnn.build_encoder
import stackgan_v1.build_gan
import stackgan_v2.build_gan
import text2image.build_gan
import word2vec.build_embedding
from text2image import improved
from word2vec.corpus import Vocabulary

SIZE = 4  # of the batch
WIDTHS = {'gf_dim': 8, 'df_dim': 4, 'residuals': 1}


def images(side):
    return torch.rand(SIZE, 3, side, side) * 2 - 1


def new_text2image(device):
    model = text2image.build_gan.Model('model', device, None, 3, 50, 100, cls_coef=1.0, int_coef=1.0)
    model.create_optim(2e-4)
    return model, {'right_images': images(64), 'wrong_images': images(64), 'right_embed': torch.randn(SIZE, 1024),
                   'inter_embed': torch.randn(SIZE, 1024)}


def new_improved(device):
    """Return text2image with the pretrained discriminator, but without augmentation, which draws random numbers."""
    model, batch = new_text2image(device)
    improved.improve(model, improved.PRETRAINED, augment_images=False, pairs=True, lr_ratio=4)
    model.create_optim(2e-4)
    return model, batch


def new_stackgan_v1(device, stage):
    section = stackgan_v1.build_gan
    stage1 = section.make_networks(device=device, **WIDTHS)[0] if stage == 2 else None
    model = section.Model('model', device, None, *section.make_networks(stage1, device=device, **WIDTHS))
    model.create_optim(2e-4)
    return model, {'right_images': images(64 if stage == 1 else 256), 'right_embed': torch.randn(SIZE, 1024)}


def new_stackgan_v2(device, conditional):
    section = stackgan_v2.build_gan
    networks = section.make_networks(branches=2, conditional=conditional, device=device, **WIDTHS)
    model = section.Model('model', device, None, *networks, color_coef=1.0)
    model.create_optim(2e-4)
    batch = {'right_images': [images(64), images(128)]}
    return model, batch | ({'wrong_images': [images(64), images(128)], 'right_embed': torch.randn(SIZE, 1024)}
                           if conditional else {})


def new_char_cnn_rnn(device):
    model = char_cnn_rnn.build_encoder.Model('model', device, None, 'birds_cvpr', 'scratch')
    model.create_optim(1e-3)
    return model, {'right_images': torch.randint(256, (SIZE, 3, 64, 64), dtype=torch.uint8),
                   'txt': [f'a bird with {number} red wings' for number in range(SIZE)]}


def new_word2vec(device, name, loss):
    vocabulary = Vocabulary([f'word{number}' for number in range(9)], list(range(2, 11)))
    model = word2vec.build_embedding.Model(name, device, None, vocabulary, vector_size=8, loss=loss)
    model.create_optim(0.01)
    return model, {'target': torch.randint(9, (SIZE,)), 'context': torch.randint(9, (SIZE, 4))}


NEW = {
    'text2image': new_text2image,
    'text2image, improved': new_improved,
    'stackgan_v1, Stage-I': lambda device: new_stackgan_v1(device, 1),
    'stackgan_v1, Stage-II': lambda device: new_stackgan_v1(device, 2),
    'stackgan_v2': lambda device: new_stackgan_v2(device, True),
    'stackgan_v2 without text': lambda device: new_stackgan_v2(device, False),
    'char_cnn_rnn': new_char_cnn_rnn,
    'word2vec, CBOW': lambda device: new_word2vec(device, 'cbow', 'softmax'),
    'word2vec, skip-gram': lambda device: new_word2vec(device, 'skipgram', 'negative'),
}
GANS = list(NEW)[:6]


def new(name, device):
    """Return (a Model with the same first weights on every device, a batch on the CPU)."""
    torch.manual_seed(1)
    model, batch = NEW[name]('cpu')
    if torch.device(device).type == 'cpu':
        return model, batch
    other, _ = NEW[name](device)  # some draw their first weights on the device
    if torch.device(device).type != 'meta':
        for net, of_cpu in zip(nets_of(other), nets_of(model), strict=True):
            net.load_state_dict(of_cpu.state_dict())
    return other, batch


def nets_of(model):
    """Return all networks of a Model, in the order of its attributes."""
    values = [one for value in vars(model).values() for one in (value if isinstance(value, list) else [value])]
    return [one for one in values if isinstance(one, torch.nn.Module)]


def parts_of(model):
    """Return the arguments of `speed.prepare` for a GAN's Model: generator, discriminators and their heads."""
    netsD = model.netsD if hasattr(model, 'netsD') else [model.netD]
    heads = [getattr(netD, name, None) for netD in netsD for name in ('get_cond_logits', 'get_uncond_logits')]
    return model.netG, netsD, [head for head in heads if head is not None]
