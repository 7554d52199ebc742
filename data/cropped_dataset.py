"""Load captioned images at one size, cropped around the bird, for the two stages of StackGAN."""
from data.multiscale_dataset import MultiscaleDataset


class CroppedDataset(MultiscaleDataset):
    """Like `MultiscaleDataset`, but an item's `right_images` is one float32 [3, size, size] in [-1, 1].

    There are no `wrong_images`: StackGAN makes its wrong pairs from the batch itself.
    """

    has_wrong_images = False

    def __init__(self, datasetFile, split=0, size=64):
        super().__init__(datasetFile, split, branches=1, base_size=size)

    def finish(self, batch, device='cpu'):
        """Convert the crops of a batch from `crops` to images, on `device`."""
        batch = super().finish(batch, device)
        return batch | {'right_images': batch['right_images'][0]}
