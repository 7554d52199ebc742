"""Captioned pictures at one size, cropped around the bird, as StackGAN's stages read them."""
from data.multiscale_dataset import MultiscaleDataset


class CroppedDataset(MultiscaleDataset):
    """As `MultiscaleDataset`, but an item's `right_images` is one float32 [3, size, size] in [-1, 1].

    There are no `wrong_images`: StackGAN's wrong pairs are made of the batch itself.
    """

    has_wrong_images = False

    def __init__(self, datasetFile, split=0, size=64):
        super().__init__(datasetFile, split, branches=1, base_size=size)

    def finish(self, batch, device='cpu'):
        """What `crops` gave, with pictures in the crops' place, on `device`."""
        batch = super().finish(batch, device)
        return batch | {'right_images': batch['right_images'][0]}
