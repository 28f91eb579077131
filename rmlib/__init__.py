"""The thin library under the reward-model book (Secrets of RLHF Part II, arXiv 2401.06080).

Importing the package pulls in nothing heavy: take the rooms you need,
``from rmlib import losses, world``.
"""

import warnings

warnings.filterwarnings("ignore", message="IProgress not found")  # progress is printed, never a widget

__version__ = "0.1.0"
