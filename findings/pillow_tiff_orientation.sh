#!/usr/bin/env bash
# One would guess: whoever reads width and height from a picture's header swaps them where its EXIF orientation is 5 to 8: Image.size is
#   that of the stored pixels, and ImageOps.exif_transpose turns them.
# What happens: right for JPEG, PNG and WebP; of a TIFF Pillow gives the turned size at once (and turned pixels on load), while getexif()
#   still says 6 until the pixels are decoded. Sizes planned from headers are then wrong for turned TIFFs alone.
# Versions: pillow 13.0.0. Date: 2026-11-27.
set -euo pipefail
home=$(mktemp -d); trap 'rm -rf "$home"' EXIT
python3 -m venv "$home/venv"
"$home/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0
cat > "$home/sizes.py" <<'PY'
import io
import PIL
from PIL import ExifTags, Image

print("pillow", PIL.__version__, "- 60 wide, 40 high, orientation 6")
found = {}
for form in ("JPEG", "PNG", "WEBP", "TIFF"):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    out = io.BytesIO()
    Image.new("RGB", (60, 40)).save(out, form, exif=exif)
    image = Image.open(out)
    found[form] = image.size, image.getexif().get(ExifTags.Base.Orientation)
    image.load()
    print(form, "opened:", *found[form], "- decoded:", image.size, image.getexif().get(ExifTags.Base.Orientation))
assert found["JPEG"] == ((60, 40), 6) and found["TIFF"] == ((40, 60), 6), "the behaviour has changed"
PY
"$home/venv/bin/python" "$home/sizes.py"
