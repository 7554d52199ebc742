"""Write a data file of squares whose classes are colors."""
import io

from PIL import Image

from data import layout

COLORS = ['red', 'green', 'blue', 'yellow', 'cyan', 'magenta', 'black', 'white', 'gray', 'orange']


def write_squares(path, train=6, photos=2, shade=0, captions=2):
    """Write an HDF5 file whose classes are colors: `train` of them for /train, the rest for /valid and /test."""
    held_out = COLORS[train:]
    splits = {'train': COLORS[:train], 'valid': held_out[::2], 'test': held_out[1::2]}
    with layout.replace_file(str(path)) as file:
        for split, colors in splits.items():
            for color in colors:
                for number in range(photos):
                    picture = Image.new('RGB', (40, 30), color)
                    picture.putpixel((0, 0), (shade, number, 0))
                    jpeg = io.BytesIO()
                    picture.save(jpeg, 'jpeg')
                    layout.write_photograph(file, split, layout.Photograph(
                        f'{color}_{number}', f'{color}_bird', jpeg.getvalue(),
                        [f'this bird is {color}', f'a small {color} bird'][:captions]))
    return str(path)
