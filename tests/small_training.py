"""Train text2image on three photographs, in two batches per epoch."""
import torch
from torch.utils.data import DataLoader

from common.training_run import TrainingRun
from data.txt2image_dataset import Text2ImageDataset
from tests import tiny
from text2image.build_gan import Model

EPOCHS, STEPS = 3, 2  # steps of an epoch: batches of 4 and 2


def make_dataset(folder):
    return Text2ImageDataset(tiny.make(folder / 'birds.hdf5', {'train': {'001.Auk': 1, '002.Jay': 2}}))


def new_model(dataset, seed=1, batch_size=4):
    torch.manual_seed(seed)
    loader = DataLoader(dataset, batch_size, shuffle=True, collate_fn=dataset.collate)
    model = Model('text2image', 'cpu', loader, 3, 50, 100, cls_coef=1.0, int_coef=1.0)  # all that is drawn counts
    model.create_optim(2e-4)
    return model


def train(model, *arguments, **settings):
    """Train any object that has a `train_step`, as a `Model` does; the arguments are those of `TrainingRun`."""
    with TrainingRun(model, *arguments, **settings) as run:
        for _ in run.epochs():
            for batch in run.batches():
                run.log(model.train_step(batch))
