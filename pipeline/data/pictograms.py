"""Eighty pictograms, one per COCO category, as text: a person can tell them apart, and so can a small tower.

A line is ``name: part; part; ...``, painted in order in a square of 100 by 100. Parts: ``e colour x0 y0 x1 y1`` an
ellipse, ``r`` a rectangle likewise, ``p colour x y x y ...`` a polygon, ``l colour width x y x y ...`` a line,
``a colour width x0 y0 x1 y1 from to`` an arc in degrees.
"""

from collections.abc import Callable

from PIL import Image, ImageDraw

TILE = 100
SCALE = 2

PICTOGRAMS = """
person: e #f2c9a0 36 2 64 30; r #2f5fd0 32 32 68 66; r #22305e 34 66 48 98; r #22305e 52 66 66 98; l #f2c9a0 8 30 36 14 60; l #f2c9a0 8 70 36 86 60
bicycle: a #222222 6 2 46 44 88 0 360; a #222222 6 56 46 98 88 0 360; l #e02020 5 23 67 42 34 76 67 50 67 42 34; l #e02020 5 74 67 68 28 82 26
car: r #d81e1e 4 44 96 74; p #d81e1e 22 44 34 22 70 22 82 44; p #bfe6ff 30 42 38 27 66 27 73 42; e #1c1c1c 14 62 38 86; e #1c1c1c 62 62 86 86
motorcycle: e #1c1c1c 0 50 36 86; e #1c1c1c 64 50 100 86; p #7a1fa2 20 60 36 38 70 38 84 62 50 70; l #444444 6 74 40 84 18; r #333333 30 30 56 40
airplane: p #e8edf2 2 46 84 40 98 50 84 60 2 54; p #8fa8c0 40 46 58 4 68 4 62 46; p #8fa8c0 40 54 58 96 68 96 62 54; p #2f7fd0 2 46 0 24 10 24 20 46
bus: r #f5a500 2 20 98 78; r #bfe6ff 8 28 26 48; r #bfe6ff 30 28 48 48; r #bfe6ff 52 28 70 48; r #bfe6ff 74 28 92 48; e #1c1c1c 14 66 36 90; e #1c1c1c 64 66 86 90
train: r #1f7a3a 2 14 98 72; r #f2f2f2 2 50 98 58; r #d8f0ff 12 22 40 44; r #d8f0ff 60 22 88 44; l #444444 5 0 88 100 88; l #444444 4 10 80 10 96; l #444444 4 36 80 36 96; l #444444 4 64 80 64 96; l #444444 4 90 80 90 96
truck: r #9aa0a6 2 18 62 70; p #2040a0 66 34 84 34 98 54 98 70 66 70; p #cfe8ff 71 39 82 39 90 52 71 52; e #111111 12 60 34 84; e #111111 68 60 90 84
boat: p #7a4a20 2 62 98 62 80 90 20 90; l #4a2a10 5 48 62 48 6; p #ffffff 52 8 52 56 92 56; p #ff7f50 44 18 44 56 12 56
traffic light: r #222222 32 4 68 84; e #ff2a2a 40 8 60 28; e #ffd42a 40 33 60 53; e #2aff55 40 58 60 78; r #555555 46 84 54 100
fire hydrant: r #e01818 34 28 66 90; e #e01818 30 8 70 44; r #b01010 16 46 84 60; r #e01818 26 86 74 98; e #ffd42a 44 46 56 58
stop sign: p #d01010 30 2 70 2 94 26 94 58 70 80 30 80 6 58 6 26; r #ffffff 20 36 80 48; r #777777 46 80 54 100
parking meter: r #6a7078 30 6 70 50; e #6a7078 30 0 70 24; e #d8f0ff 38 10 62 32; r #44494f 45 50 55 100; r #ffd42a 40 36 60 42
bench: r #8b5a2b 4 30 96 40; r #8b5a2b 4 50 96 62; l #3a3a3a 6 14 30 14 94; l #3a3a3a 6 86 30 86 94
bird: e #3a86ff 18 34 74 72; e #3a86ff 60 18 88 46; p #ffb000 86 28 100 34 86 38; p #1f5fc0 2 34 34 46 22 64; l #ff8800 4 40 70 38 92; l #ff8800 4 54 70 56 92
cat: e #6b6b6b 22 30 78 86; p #6b6b6b 24 48 26 10 48 34; p #6b6b6b 76 48 74 10 52 34; e #b8ff4a 34 46 46 58; e #b8ff4a 54 46 66 58; p #ff9aa8 46 64 54 64 50 70
dog: e #a8672c 20 18 76 76; e #6a3a12 6 18 28 66; e #6a3a12 68 18 90 66; e #1a1a1a 34 36 42 46; e #1a1a1a 54 36 62 46; e #f0d0a8 34 50 64 80; e #1a1a1a 42 52 56 62
horse: e #7a3f16 14 36 76 68; p #7a3f16 64 46 78 8 96 18 92 30 80 56; r #5a2c0c 20 60 28 98; r #5a2c0c 34 60 42 98; r #5a2c0c 54 60 62 98; r #5a2c0c 66 60 74 98; l #2a1404 6 14 44 2 78; l #2a1404 6 70 34 76 8
sheep: e #f4f4f0 10 24 82 74; e #e4e4dc 8 30 40 60; e #e4e4dc 40 20 76 52; e #2b2b2b 70 30 96 60; r #2b2b2b 24 70 32 94; r #2b2b2b 60 70 68 94
cow: r #fafafa 10 30 76 68; e #161616 18 34 42 60; e #161616 52 44 72 66; e #fafafa 68 18 98 48; e #ffb0b8 78 36 98 50; r #161616 14 66 24 96; r #161616 62 66 72 96
elephant: e #8d97a5 10 22 76 76; e #8d97a5 58 16 90 52; e #6f7988 54 20 74 54; l #8d97a5 9 84 44 92 66 84 92; r #6f7988 18 66 34 96; r #6f7988 52 66 68 96
bear: e #4a2a12 16 20 84 92; e #4a2a12 12 8 38 34; e #4a2a12 62 8 88 34; e #c89868 34 50 66 80; e #101010 43 52 57 62; e #101010 32 36 40 44; e #101010 60 36 68 44
zebra: e #ffffff 10 34 76 70; p #ffffff 64 46 80 8 96 16 84 56; l #101010 5 22 38 22 68; l #101010 5 36 34 36 70; l #101010 5 50 34 50 70; l #101010 5 64 36 64 68; l #101010 5 72 34 88 42; l #101010 4 78 20 94 26; r #101010 20 66 27 98; r #101010 60 66 67 98
giraffe: e #f0c040 20 50 76 80; p #f0c040 62 62 72 4 84 4 80 64; e #f0c040 70 0 98 16; e #8a4a10 30 54 42 66; e #8a4a10 50 58 62 70; e #8a4a10 70 30 78 40; r #c89820 26 74 32 100; r #c89820 64 74 70 100
backpack: r #1a9a8a 22 20 78 94; e #1a9a8a 22 6 78 44; a #0d5a50 6 38 0 62 24 180 360; r #0d5a50 30 56 70 86; l #ffd42a 3 30 64 70 64
umbrella: p #c01fa0 2 52 14 24 50 6 86 24 98 52; l #ffffff 2 34 52 50 8 66 52; l #333333 5 50 50 50 90; a #333333 5 50 80 66 98 0 180
handbag: p #c2185b 10 46 90 46 98 94 2 94; a #7a0f3a 7 26 10 74 76 180 360; e #ffd700 44 50 56 62
tie: p #1030a0 40 4 60 4 56 22 44 22; p #1030a0 44 22 56 22 68 76 50 98 32 76; l #ffe040 4 40 52 60 42; l #ffe040 4 38 72 64 58
suitcase: r #8b4513 6 28 94 90; a #3a1a05 7 34 10 66 46 180 360; r #d2a060 20 28 28 90; r #d2a060 72 28 80 90
frisbee: e #ff3fa4 4 34 96 66; e #ffc0e0 22 40 78 58
skis: l #e03030 7 16 96 70 4; l #e03030 7 34 98 88 8; l #333333 3 8 40 40 96; l #333333 3 60 10 96 70
snowboard: p #20d0e0 4 78 20 94 96 24 82 6; l #ff2fd0 6 30 72 74 30; e #202020 32 60 44 72; e #202020 60 32 72 44
sports ball: e #ff8c1a 8 8 92 92; l #1a1a1a 4 8 50 92 50; l #1a1a1a 4 50 8 50 92; a #1a1a1a 4 -40 8 34 92 300 60; a #1a1a1a 4 66 8 140 92 120 240
kite: p #ffe010 50 2 88 36 50 74 12 36; p #e02020 50 2 88 36 50 36; p #2060ff 12 36 50 36 50 74; l #404040 3 50 74 62 84 44 92 56 100
baseball bat: p #d8a860 84 2 98 14 34 76 24 66; l #6a3a10 7 30 70 6 94; e #6a3a10 0 88 12 100
baseball glove: e #8a4a18 10 24 84 96; e #8a4a18 8 4 30 56; e #8a4a18 32 0 54 50; e #8a4a18 58 4 80 54; e #6a3208 34 44 70 80; e #ffffff 42 50 62 70
skateboard: p #f04f9a 2 40 12 52 88 52 98 40 98 48 88 60 12 60 2 48; e #303030 16 60 34 78; e #303030 66 60 84 78
surfboard: e #ffef5a 32 0 68 100; l #ff5030 5 50 4 50 96; l #1aa0e0 6 34 40 66 40
tennis racket: a #e02828 7 20 0 80 62 0 360; l #c0c0c0 2 34 8 34 56; l #c0c0c0 2 50 4 50 60; l #c0c0c0 2 66 8 66 56; l #c0c0c0 2 24 20 76 20; l #c0c0c0 2 22 36 78 36; r #222222 46 62 54 100
bottle: r #1f8a3f 34 34 66 98; p #1f8a3f 34 36 44 20 56 20 66 36; r #1f8a3f 44 6 56 22; r #e0c030 43 0 57 8; r #f6f0d8 34 52 66 76
wine glass: p #e8f0ff 28 4 72 4 66 44 50 54 34 44; p #8a0f2a 31 20 69 20 65 42 50 52 35 42; l #d0d8e8 5 50 52 50 90; l #d0d8e8 6 30 94 70 94
cup: r #ffffff 20 26 68 82; a #ffffff 8 56 36 90 70 270 90; e #6a3a18 20 18 68 36; l #2f7fd0 5 20 60 68 60
fork: l #b0b8c4 7 50 40 50 98; r #b0b8c4 32 4 38 36; r #b0b8c4 46 4 54 42; r #b0b8c4 62 4 68 36; r #b0b8c4 32 32 68 42
knife: p #d8dee8 44 2 62 20 62 58 44 58; r #3a2a1a 44 58 60 98
spoon: e #c8d0dc 32 2 68 42; l #c8d0dc 7 50 40 50 98; e #98a0ac 40 10 60 32
bowl: p #3f7fe0 4 40 96 40 82 80 64 90 36 90 18 80; e #a8c8ff 4 30 96 50
banana: a #ffe135 22 6 -30 94 78 20 160; e #5a3a10 2 40 14 52
apple: e #d01f2f 12 26 60 92; e #d01f2f 40 26 88 92; l #5a3010 5 50 30 54 8; e #3fae3f 54 6 78 20
sandwich: p #e8c080 4 30 96 30 50 4; r #3fae3f 6 36 94 44; r #e03030 8 46 92 54; r #ffd85a 6 56 94 62; p #e8c080 4 66 96 66 92 84 8 84
orange: e #ff9412 8 10 92 94; e #ffb860 26 24 46 42; e #2f8f2f 44 4 64 16
broccoli: e #2f8f3a 10 8 50 50; e #2f8f3a 48 8 90 50; e #3fae4a 28 0 72 46; e #267a30 20 28 80 64; p #a8d890 38 56 62 56 66 98 34 98
carrot: p #ff7a1a 30 30 70 30 50 100; p #2fae3f 50 34 30 2 44 8 50 0 58 8 70 2; l #c85a10 3 38 48 56 48; l #c85a10 3 46 66 60 66
hot dog: e #e0a860 2 32 98 80; e #b03a20 6 34 94 62; l #ffe020 5 12 50 26 42 40 52 54 42 68 52 86 44
pizza: p #f4c860 4 14 96 14 50 98; p #b8702a 2 6 98 6 96 18 4 18; e #d02a1a 30 26 46 42; e #d02a1a 56 24 72 40; e #d02a1a 44 54 58 68
donut: e #d8914a 4 8 96 94; e #ff7fc0 10 14 90 84; e #ffffff 36 38 64 62; l #3f9fff 4 24 30 32 36; l #ffe020 4 66 28 74 34; l #3fdf6f 4 60 74 68 70
cake: r #f8e0e8 12 40 88 92; r #b05a7a 12 62 88 70; p #ff9ac0 12 40 88 40 88 50 76 56 64 48 50 58 36 48 24 56 12 50; r #3f9fff 46 16 54 40; e #ffb020 44 2 56 18
chair: r #b5651d 26 4 36 60; r #b5651d 26 50 78 62; l #b5651d 7 30 60 30 98; l #b5651d 7 74 60 74 98; r #d89850 36 10 42 50
couch: r #6a3fb0 4 40 96 82; r #8a5fd0 16 24 84 58; e #6a3fb0 0 36 22 82; e #6a3fb0 78 36 100 82; r #3a1f60 10 82 18 94; r #3a1f60 82 82 90 94
potted plant: p #c0602a 28 62 72 62 64 98 36 98; e #2fae3f 12 26 48 60; e #2fae3f 52 26 88 60; e #3fc850 34 2 66 50; l #1f7a2f 4 50 62 50 30
bed: r #e8e8f8 4 46 96 74; r #5a8ad8 36 46 96 74; r #ffffff 8 36 32 52; l #6a3a10 7 4 20 4 94; l #6a3a10 7 96 40 96 94
dining table: r #6b3e12 2 34 98 46; l #6b3e12 9 12 46 12 98; l #6b3e12 9 88 46 88 98; e #f4f4f4 36 22 64 36
toilet: r #f8fbff 22 4 58 46; e #f8fbff 18 44 88 78; e #c8d8e8 28 48 78 66; r #e0e8f0 36 74 70 98; r #90a0b0 28 8 40 14
tv: r #111111 4 12 96 76; r #5ac8fa 10 18 90 70; p #5fd068 10 70 36 40 56 60 74 46 90 70; r #111111 30 84 70 92; r #111111 46 76 54 86
laptop: r #50565e 14 12 86 64; r #dff1ff 20 18 80 58; p #b8bec8 2 88 14 66 86 66 98 88; l #50565e 3 30 76 70 76
mouse: e #f0f0f0 26 16 74 94; l #606060 3 50 18 50 50; l #606060 3 28 50 72 50; l #303030 4 50 16 60 0
remote: r #151515 34 2 66 98; e #ff2020 42 8 58 22; e #d0d0d0 40 32 48 40; e #d0d0d0 52 32 60 40; e #d0d0d0 40 48 48 56; e #d0d0d0 52 48 60 56; e #d0d0d0 40 64 48 72; e #d0d0d0 52 64 60 72
keyboard: r #2a2e36 2 30 98 72; r #e8e8e8 8 36 18 44; r #e8e8e8 22 36 32 44; r #e8e8e8 36 36 46 44; r #e8e8e8 50 36 60 44; r #e8e8e8 64 36 74 44; r #e8e8e8 78 36 92 44; r #e8e8e8 8 48 22 56; r #e8e8e8 26 48 60 56; r #e8e8e8 64 48 92 56; r #e8e8e8 24 60 76 67
cell phone: r #20242c 28 2 72 98; r #7af0c0 33 12 67 82; e #e0e0e0 45 86 55 96
microwave: r #d0d4da 2 22 98 82; r #1c1c1c 10 32 66 72; r #3fe060 74 32 92 42; e #606060 76 50 90 64
oven: r #5c636e 8 4 92 98; r #141414 18 44 82 86; e #ff6a1a 26 62 74 84; e #e8e8e8 16 12 30 26; e #e8e8e8 38 12 52 26; e #e8e8e8 60 12 74 26; r #d8d8d8 18 34 82 39
toaster: r #c8ccd4 8 38 92 92; r #d89a50 22 10 44 40; r #d89a50 54 10 76 40; r #303030 86 52 98 62; l #808890 3 8 76 92 76
sink: p #dfe8f0 4 46 96 46 84 90 16 90; e #8fb8d8 14 50 86 78; l #98a0a8 8 50 46 50 14 72 14 72 30
refrigerator: r #eef4fa 22 2 78 98; l #8898a8 3 22 38 78 38; r #8898a8 66 14 71 32; r #8898a8 66 44 71 70
book: p #1f4fb0 4 20 48 28 48 92 4 84; p #2f6fe0 96 20 52 28 52 92 96 84; l #ffffff 3 12 38 40 44; l #ffffff 3 12 52 40 58; l #ffffff 3 60 44 88 38; l #ffffff 3 60 58 88 52
clock: e #7a1f1f 4 4 96 96; e #fffdf0 12 12 88 88; l #101010 5 50 50 50 22; l #101010 5 50 50 70 62; e #101010 46 46 54 54
vase: p #2ab0b0 36 30 64 30 80 64 66 98 34 98 20 64; l #2f8f2f 4 50 30 40 8; l #2f8f2f 4 50 30 62 8; e #ff4f8f 30 0 48 16; e #ffd040 54 0 72 16
scissors: l #b8c0cc 6 34 60 74 4; l #b8c0cc 6 66 60 26 4; a #e0302a 8 12 56 44 96 0 360; a #e0302a 8 56 56 88 96 0 360
teddy bear: e #d8a058 26 40 74 96; e #d8a058 28 8 72 50; e #d8a058 22 2 42 22; e #d8a058 58 2 78 22; e #f8e0b8 40 26 60 44; e #d8a058 8 46 34 64; e #d8a058 66 46 92 64; p #e02020 38 50 50 55 62 50 62 60 50 55 38 60
hair drier: e #ff5a8a 6 10 62 60; p #ff5a8a 50 22 96 14 96 54 50 48; p #c03060 24 52 48 52 42 98 26 98; r #303030 90 12 98 56
toothbrush: l #28c0d8 8 4 90 72 22; p #ffffff 62 8 84 24 90 14 70 0; l #ff5a8a 4 10 84 36 58
"""

Painter = Callable[[ImageDraw.ImageDraw], None]


def parse_pictograms(text: str = PICTOGRAMS) -> dict[str, tuple[tuple[str, ...], ...]]:
    """The parts of each pictogram by category name, in painting order."""
    parsed = {}
    for line in text.strip().splitlines():
        name, _, parts = line.partition(": ")
        parsed[name] = tuple(tuple(part.split()) for part in parts.split("; "))
    return parsed


def draw_pictogram(parts: tuple[tuple[str, ...], ...]) -> Image.Image:
    """One pictogram on a transparent square, RGBA, ``TILE * SCALE`` pixels a side."""
    image = Image.new("RGBA", (TILE * SCALE, TILE * SCALE))
    draw = ImageDraw.Draw(image)
    for kind, colour, *words in parts:
        numbers = [SCALE * float(word) for word in words]
        if kind == "e":
            draw.ellipse(numbers, colour)
        elif kind == "r":
            draw.rectangle(numbers, colour)
        elif kind == "p":
            draw.polygon(numbers, colour)
        elif kind == "l":
            draw.line(numbers[1:], colour, round(numbers[0]), joint="curve")
        else:
            start, end = (float(word) for word in words[-2:])
            draw.arc(numbers[1:5], start, end, colour, round(numbers[0]))
    return image
