"""Declarations of torchvision's operators; setup.py says what for."""

import torch.library

_library = torch.library.Library("torchvision", "FRAGMENT")  # the declarations live as long as this object


def declare() -> None:
    for name in ("nms", "qnms"):
        _library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
