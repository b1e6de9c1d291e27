"""Painting the parts of a person that are not clothes: background, skin, hair, face, hands and shoes."""

from __future__ import annotations

import cv2
import numpy as np

from model.embedded.body import Figure, Skeleton, limb
from model.embedded.canvas import UNITS_WH, Canvas, Points, bend, ellipse
from model.embedded.textures import Colour, shade

LABELS = ("background", "hair", "face", "neck", "upper", "lower", "dress", "arm", "hand", "leg", "shoe")
HAIR, FACE, NECK, UPPER, LOWER, DRESS, ARM, HAND, LEG, SHOE = range(1, len(LABELS))

_FLOOR_Y = 206.0  # figure units: where the wall meets the floor
_EDGE = 0.72  # lines around skin and hair are this much darker
_LIP: Colour = (178, 74, 74)


def paint_backdrop(canvas: Canvas, figure: Figure) -> None:
    """Fill the whole picture."""
    height = canvas.image.shape[0]
    far, near = np.array(figure.wall, float), np.array(figure.floor, float)
    if figure.backdrop == "plain":
        canvas.image[:] = figure.wall
    else:
        share = np.linspace(0, 1, height)[:, None] * (0.9 if figure.backdrop == "gradient" else 0.25)
        column = np.rint(far * (1 - share) + near * share).astype(np.uint8)[:, None]  # (H, 1, 3)
        # Ten times faster than broadcasting over pixels of three bytes.
        cv2.resize(column, canvas.image.shape[1::-1], dst=canvas.image, interpolation=cv2.INTER_NEAREST)
    # Wider than the figure's units: a broad picture shows more to the sides.
    left, right, bottom = -4.0 * UNITS_WH[0], 5.0 * UNITS_WH[0], 2.0 * UNITS_WH[1]
    if figure.backdrop == "room":
        canvas.flat(_rectangle(left, _FLOOR_Y, right, bottom), figure.floor, 0)
        canvas.flat(_rectangle(left, _FLOOR_Y - 5, right, _FLOOR_Y), shade(figure.wall, 1.06), 0)
        canvas.line(np.array([[left, _FLOOR_Y], [right, _FLOOR_Y]]), shade(figure.floor, 0.85), 1)
        frame = 18.0 if figure.shift > 0 else 138.0
        canvas.flat(_rectangle(frame, 24, frame + 36, 70), shade(figure.floor, 0.8), 0)
        canvas.flat(_rectangle(frame + 3, 27, frame + 33, 67), shade(figure.wall, 1.08), 0)
        canvas.flat(ellipse((frame + 18, 47), 8, 8), shade(figure.floor, 1.05), 0)
    elif figure.backdrop == "outdoors":
        canvas.flat(ellipse((30, 44), 16, 7), (255, 255, 255), 0)
        canvas.flat(ellipse((44, 40), 13, 8), (255, 255, 255), 0)
        canvas.flat(ellipse((160, 64), 17, 6), (250, 252, 255), 0)
        canvas.flat(ellipse((20, 226), 130, 42), shade(figure.floor, 1.1), 0)
        canvas.flat(ellipse((190, 232), 150, 40), figure.floor, 0)
        canvas.flat(_rectangle(left, 224, right, bottom), shade(figure.floor, 0.95), 0)
    shadow = figure.floor if figure.backdrop in ("room", "outdoors") else figure.wall
    canvas.flat(ellipse((96 + figure.shift, 243), 40 * figure.build, 5), shade(shadow, 0.84), 0)


def paint_behind(canvas: Canvas, figure: Figure, bones: Skeleton) -> None:
    """Hair that falls behind the shoulders, then legs, trunk and neck."""
    _paint_back_hair(canvas, figure, bones)
    unit, edge = bones.unit, shade(figure.skin, _EDGE)
    for leg in bones.legs:
        widths = (bones.hip_half * 0.46, 7.4 * unit, 4.9 * unit)
        canvas.flat(limb(leg, widths, stop=1.03), figure.skin, LEG, edge=edge)
    canvas.flat(_trunk(bones), figure.skin, NECK, edge=edge)
    chin = ellipse((bones.x, bones.head + 15 * unit), 8 * unit, 7 * unit, arc_deg=(0, 180))
    canvas.flat(chin, shade(figure.skin, 0.86), NECK)


def paint_arm(canvas: Canvas, figure: Figure, bones: Skeleton, side: int, *, start: float = 0.0) -> None:
    """One bare arm without its hand, from `start` (share of its length); side 0 is the viewer's left."""
    widths = (6.4 * bones.unit, 5.2 * bones.unit, 3.9 * bones.unit)
    outline = limb(bones.arms[side], widths, start=start, stop=1.05)
    canvas.flat(outline, figure.skin, ARM, edge=shade(figure.skin, _EDGE))
    root = (outline[0] + outline[-1]) / 2  # a round end there, which hides the line across the arm
    radius = float(np.linalg.norm(outline[0] - outline[-1])) / 2
    canvas.flat(ellipse((float(root[0]), float(root[1])), radius, radius), figure.skin, ARM)


def paint_hands_and_shoes(canvas: Canvas, figure: Figure, bones: Skeleton) -> None:
    """What lies in front of every garment, apart from the head."""
    unit, edge = bones.unit, shade(figure.skin, _EDGE)
    for side, (_, elbow, wrist) in zip((-1, 1), bones.arms):
        ahead = (wrist - elbow) / np.linalg.norm(wrist - elbow)
        aside = np.array([ahead[1], -ahead[0]]) * -side
        palm, thumb = wrist + ahead * 4.2 * unit, wrist + ahead * 4.5 * unit + aside * 4 * unit
        canvas.flat(ellipse((thumb[0], thumb[1]), 2.1 * unit, 2.6 * unit), figure.skin, HAND, edge=edge)
        canvas.flat(_oval(palm, ahead, 6.4 * unit, 4.6 * unit), figure.skin, HAND, edge=edge)
    for side, leg in zip((-1, 1), bones.legs):
        x = float(leg[2, 0]) + side * 2 * unit
        shoe = ellipse((x, bones.sole - 1.5), 9 * unit, 9.5 * unit, arc_deg=(180, 360))
        canvas.flat(shoe, figure.shoes, SHOE, edge=shade(figure.shoes, _EDGE))
        canvas.flat(_rectangle(x - 9.5 * unit, bones.sole - 2, x + 9.5 * unit, bones.sole), (244, 244, 240), SHOE)


def paint_head(canvas: Canvas, figure: Figure, bones: Skeleton) -> None:
    """Head, face and the hair in front."""
    x, y, unit = bones.x, bones.head, bones.unit
    edge = shade(figure.skin, _EDGE)
    for side in (-1, 1):
        canvas.flat(ellipse((x + side * 13 * unit, y + 2 * unit), 2.6 * unit, 4 * unit), figure.skin, FACE, edge=edge)
    canvas.flat(_skull(x, y, unit), figure.skin, FACE, edge=edge)
    _paint_face(canvas, figure, bones)
    _paint_front_hair(canvas, figure, bones)


def _paint_face(canvas: Canvas, figure: Figure, bones: Skeleton) -> None:
    x, y, unit = bones.x, bones.head, bones.unit
    blush = tuple(round(part * 0.8 + tint * 0.2) for part, tint in zip(figure.skin, (235, 90, 90)))
    for side in (-1, 1):
        eye = x + side * 5.2 * unit
        canvas.flat(
            ellipse((x + side * 8 * unit, y + 7 * unit), 2.8 * unit, 2 * unit), (blush[0], blush[1], blush[2]), FACE
        )
        canvas.flat(ellipse((eye, y + 1.5 * unit), 2.3 * unit, 2 * unit), (255, 255, 255), FACE)
        canvas.flat(ellipse((eye, y + 1.6 * unit), 1.4 * unit, 1.7 * unit), (40, 30, 30), FACE)
        brow = bend((eye - 3 * unit, y - 2.6 * unit), (eye, y - 4.6 * unit), (eye + 3 * unit, y - 2.6 * unit))
        canvas.line(brow, shade(figure.hair, 0.8), 1.1 * unit)
    canvas.line(
        bend((x, y + 3 * unit), (x + 2.2 * unit, y + 7 * unit), (x, y + 7 * unit)), shade(figure.skin, 0.78), 0.9 * unit
    )
    mouth = bend(
        (x - 4 * unit, y + 10.4 * unit), (x, y + (11.8 + 2.6 * figure.smile) * unit), (x + 4 * unit, y + 10.4 * unit)
    )
    canvas.line(mouth, _LIP, 1.4 * unit)


def _paint_back_hair(canvas: Canvas, figure: Figure, bones: Skeleton) -> None:
    x, y, unit, style = bones.x, bones.head, bones.unit, figure.hair_style
    dark = shade(figure.hair, 0.82)
    if style in ("long", "bob"):
        length = 50 if style == "long" else 20
        half = np.concatenate(
            [
                bend((x, y - 19 * unit), (x + 17 * unit, y - 19 * unit), (x + 17 * unit, y)),
                bend((x + 17 * unit, y), (x + 18 * unit, y + length * 0.6 * unit), (x + 15 * unit, y + length * unit)),
            ]
        )
        mirrored = half[::-1].copy()
        mirrored[:, 0] = 2 * x - mirrored[:, 0]
        canvas.flat(np.concatenate([half, mirrored]), dark, HAIR)
    elif style == "ponytail":
        tail = bend((x + 8 * unit, y - 12 * unit), (x + 34 * unit, y - 6 * unit), (x + 22 * unit, y + 34 * unit))
        back = bend((x + 22 * unit, y + 34 * unit), (x + 20 * unit, y + 4 * unit), (x + 8 * unit, y - 2 * unit))
        canvas.flat(np.concatenate([tail, back]), dark, HAIR)
    elif style == "curly":
        for angle in np.deg2rad(np.arange(150, 400, 25)):
            canvas.flat(
                ellipse(
                    (x + 14 * unit * np.cos(angle), y - 3 * unit + 14 * unit * np.sin(angle)), 6.5 * unit, 6.5 * unit
                ),
                dark,
                HAIR,
            )
    elif style == "bun":
        canvas.flat(ellipse((x, y - 20 * unit), 7 * unit, 6 * unit), dark, HAIR)


def _paint_front_hair(canvas: Canvas, figure: Figure, bones: Skeleton) -> None:
    x, y, unit, style = bones.x, bones.head, bones.unit, figure.hair_style
    if style == "bald":
        return
    crown = ellipse((x, y), 14.6 * unit, 18.2 * unit, arc_deg=(182, 358))
    if style == "curly":
        for angle in np.deg2rad(np.arange(195, 350, 22)):
            canvas.flat(
                ellipse(
                    (x + 11 * unit * np.cos(angle), y - 1 * unit + 14.5 * unit * np.sin(angle)), 5 * unit, 5 * unit
                ),
                figure.hair,
                HAIR,
            )
        return
    parting = x + (6 if style in ("short", "bob") else 0) * unit
    fringe = [
        bend((x + 14.4 * unit, y + 1 * unit), (x + 12 * unit, y - 8 * unit), (parting, y - 11 * unit)),
        bend((parting, y - 11 * unit), (x - 11 * unit, y - 8 * unit), (x - 14.4 * unit, y + 1 * unit)),
    ]
    canvas.flat(np.concatenate([crown, *fringe]), figure.hair, HAIR, edge=shade(figure.hair, 0.82))
    if style in ("long", "bob"):
        for side in (-1, 1):
            lock = bend(
                (x + side * 14.5 * unit, y - 4 * unit),
                (x + side * 17.5 * unit, y + 6 * unit),
                (x + side * 14 * unit, y + 17 * unit),
            )
            inner = bend(
                (x + side * 14 * unit, y + 17 * unit),
                (x + side * 12 * unit, y + 6 * unit),
                (x + side * 12 * unit, y - 5 * unit),
            )
            canvas.flat(np.concatenate([lock, inner]), figure.hair, HAIR)


def _trunk(bones: Skeleton) -> Points:
    x, half, unit = bones.x, bones.shoulder_half, bones.unit
    right = np.concatenate(
        [
            np.array([[x, bones.neck - 14 * unit], [x + bones.neck_half, bones.neck - 14 * unit]]),
            bend(
                (x + bones.neck_half, bones.neck - 2 * unit),
                (x + bones.neck_half, bones.shoulder - 5 * unit),
                (x + half * 0.55, bones.shoulder - 2.6 * unit),
            ),
            bend(
                (x + half - 6 * unit, bones.shoulder),
                (x + half, bones.shoulder),
                (x + half - 1, bones.shoulder + 9 * unit),
            ),
            np.array(
                [
                    [x + half - 4 * unit, bones.shoulder + 22 * unit],
                    [x + bones.waist_half, bones.waist],
                    [x + bones.hip_half, bones.hip],
                    [x, bones.crotch],
                ]
            ),
        ]
    )
    left = right[::-1].copy()
    left[:, 0] = 2 * x - left[:, 0]
    return np.concatenate([right, left])


def _skull(x: float, y: float, unit: float) -> Points:
    crown = ellipse((x, y), 13.2 * unit, 16.5 * unit, arc_deg=(180, 360))
    right = bend((x + 13.2 * unit, y), (x + 13 * unit, y + 15.5 * unit), (x, y + 17.5 * unit))
    left = right[::-1].copy()
    left[:, 0] = 2 * x - left[:, 0]
    return np.concatenate([crown, right, left])


def _oval(centre: Points, along: Points, half_length: float, half_width: float) -> Points:
    angle = np.linspace(0, 2 * np.pi, 28)[:, None]
    across = np.array([-along[1], along[0]])
    return np.asarray(centre + np.cos(angle) * along * half_length + np.sin(angle) * across * half_width)


def _rectangle(left: float, top: float, right: float, bottom: float) -> Points:
    return np.array([[left, top], [right, top], [right, bottom], [left, bottom]])
