"""The portrait world redrawn for 128 pixels and more, with light, strands, grain, and a fairy tale.

Nothing is trained on it yet: the CLIP, the generator and the judge in miniature/weights know the
persons of miniature/faces.py, and every figure is of those. The names here are the same, so that
the training scripts can change over by their imports. `python -m miniature.portraits` draws it.
"""
