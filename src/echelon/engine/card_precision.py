"""Precisions on cards: what ``auto`` means there, and whether fp8 may be used. No torch.

A half precision is compared with fp32 before its first use with a model on a kind of card, as int8
is on CPU, and the result is stored. Where it does not pass, or gives no numbers, the other one is
tried, then fp32 is used.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from echelon.engine.check_store import store_row, stored_row
from echelon.engine.precision_check import Comparisons, PrecisionCheck, require_passed
from echelon.errors import EchelonWarning, InvalidInput, OutOfMemory
from echelon.models.device import choose_device, choose_precision
from echelon.models.registry import card_name, card_precisions
from echelon.profile import ProfileKey, library_versions
from echelon.progress import Progress, no_progress

if TYPE_CHECKING:
    from echelon.models.hub import ModelFolder
    from echelon.options import Options, Precision
    from echelon.tokenization.tokenizer import PairEncoder

logger = logging.getLogger(__name__)


def choose_on_card(
    folder: ModelFolder,
    options: Options,
    encoder: PairEncoder,
    on_progress: Progress = no_progress,
) -> Options:
    """The options, with the precision that ``auto`` is on a card; others stay as they are.

    Warns:
        EchelonWarning: no half precision ranks as fp32 does, so fp32 is used.
    """
    halves = card_precisions(folder.path, options.device) if options.precision == "auto" else []
    if not halves:
        return options
    comparisons = Comparisons(PrecisionCheck.of(folder, options, encoder))
    reasons = []
    for half in halves:
        try:
            require_passed(_row_of(folder, options, half, comparisons, on_progress))
        except InvalidInput as error:
            logger.info("%s", error)
            reasons.append(error.problem)
        except OutOfMemory as error:
            logger.warning("%s could not be compared with fp32: %s", half, error)
            return replace(options, precision=cast("Precision", half))
        else:
            return replace(options, precision=cast("Precision", half))
    warnings.warn(f"fp32 is used: {'; '.join(reasons)}.", EchelonWarning, stacklevel=4)
    return replace(options, precision="fp32")


def require_float8(
    folder: ModelFolder,
    options: Options,
    encoder: PairEncoder,
    on_progress: Progress = no_progress,
) -> None:
    """Compare fp8 with fp32 where it was chosen.

    Raises:
        InvalidInput: it does not rank as fp32 does, or the device has none.
    """
    if options.precision != "fp8":
        return
    choose_precision("fp8", choose_device(options.device))
    comparisons = Comparisons(PrecisionCheck.of(folder, options, encoder))
    require_passed(_row_of(folder, options, "fp8", comparisons, on_progress))


def _row_of(
    folder: ModelFolder,
    options: Options,
    half: str,
    comparisons: Comparisons,
    on_progress: Progress,
) -> dict[str, Any]:
    """The result of an earlier comparison on this kind of card, or of one now."""
    name = card_name(options.device)
    key = ProfileKey(folder.name, folder.revision, "cuda", name, half, library_versions())
    row = stored_row(key)
    if row is None:
        logger.info("Comparing %s with fp32, once for this model and kind of card.", half)
        on_progress(f"comparing {half} with fp32")
        row = comparisons.row(half)
        store_row(key, row)
    return row
