"""The map of the latent space as a picture."""

import io

import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from vavae.metrics.latent_space import LatentMap

_COLORS = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0.15, 0.9, 256)))
"""Without its ends, one of which would be lost on a dark page and the other on a light one."""
_INCHES, _DPI = 5, 144
_AREA = 20_000
"""Of all points together, in square points; few are drawn large."""


def latent_map_png(found: LatentMap) -> bytes:
    """The map as a PNG, each point in the color of its density, the densest brightest."""
    figure = Figure(figsize=(_INCHES, _INCHES), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot(aspect="equal")
    axes.set_axis_off()
    order = np.argsort(found.densities)  # the densest on top
    x, y = found.points[order].T
    axes.scatter(x, y, _AREA / len(order), found.densities[order], cmap=_COLORS, linewidths=0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True, metadata={"Software": None})
    return buffer.getvalue()
