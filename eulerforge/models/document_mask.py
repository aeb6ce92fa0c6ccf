"""stub"""

from typing import Literal

Way = Literal["mask", "positions"]
