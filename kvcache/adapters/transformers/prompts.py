"""Prompts of a call of ``generate``, and the token ids of what its cache holds."""

from __future__ import annotations

import reprlib
from typing import NamedTuple, Self

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedConfig

from kvcache.errors import NotSupportedError, ShapeError
from kvcache.layers.base import LayerCache
from kvcache.layers.stack import LayerCaches

from .cache import ModelCache


class Prompts(NamedTuple):
    """Prompts of one batch, padded on the left.

    ids: ``[B, columns]``. padding: columns of padding of each row.
    """

    ids: Tensor
    padding: list[int]

    def row(self, number: int) -> Tensor:
        """Return the ids of one prompt, without its padding."""
        return self.ids[number, self.padding[number] :]


def as_prompts(
    input_ids: Tensor, attention_mask: Tensor | None, config: GenerationConfig
) -> Prompts:
    """Return the prompts that ``generate`` would see in these arguments.

    config: tells the id of padding.

    Raises: TypeError, ShapeError for anything but ids ``[B, columns]`` and a mask alike; ValueError
        for padding that is not on the left, or in every row, or told by the id alone.
    """
    _check_tensor(input_ids, "input_ids is a tensor of token ids")
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ShapeError(f"input_ids is [B, columns], not empty; got {tuple(input_ids.shape)}.")
    if attention_mask is None:
        _check_unpadded(input_ids, config)
        return Prompts(input_ids.clone(), [0] * len(input_ids))
    _check_tensor(attention_mask, "attention_mask is a tensor of 0 and 1")
    if attention_mask.shape != input_ids.shape:
        raise ShapeError(
            "attention_mask has the shape of input_ids; got "
            f"{tuple(attention_mask.shape)} and {tuple(input_ids.shape)}."
        )
    return Prompts(input_ids.clone(), _padding_of(attention_mask != 0))


def _check_tensor(value: object, rule: str) -> None:
    if not isinstance(value, Tensor) or value.is_floating_point():
        raise TypeError(f"{rule}; got {reprlib.repr(value)}.")


def _check_unpadded(ids: Tensor, config: GenerationConfig) -> None:
    """Raise ValueError where the library would take tokens for padding by their id alone."""
    pad, ends = config.pad_token_id, config.eos_token_id
    if pad is None or pad in (ends if isinstance(ends, list) else [ends]):
        return
    if bool((ids == pad).any()):
        raise ValueError(
            f"attention_mask tells which tokens are padding; got none, and the id {pad} of padding "
            "in input_ids. Give the mask here and to generate."
        )


def _padding_of(is_token: Tensor) -> list[int]:
    """Return the columns of padding of each row of a mask. Raises: ValueError."""
    columns = is_token.shape[1]
    padding = columns - is_token.sum(-1)
    expected = torch.arange(columns, device=padding.device) >= padding[:, None]
    if not torch.equal(is_token, expected):
        raise ValueError("prompts are padded on their left; got a mask with other zeros.")
    if least := int(padding.min()):
        raise ValueError(
            f"one prompt of a batch has no padding; got {least} columns of it in each. Leave them "
            f"out of input_ids and attention_mask: [:, {least}:]."
        )
    numbers: list[int] = padding.tolist()
    return numbers


class PromptCache(ModelCache):
    """The cache of a session, which knows the ids of all tokens that it holds.

    caches: hold the first columns of `prompts`, in each row as many.
    origins: for every row, the number of its prompt.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        caches: LayerCaches[LayerCache],
        prompts: Prompts,
        origins: list[int],
    ) -> None:
        super().__init__(config, caches)
        self._prompts, self.origins = prompts, origins
        self._ids: list[Tensor] = [prompts.ids[origins, : self._length]]
        self._noted: int = self._ids[0].shape[1]

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        clone = type(self)(self.config, self.caches.copy(), self._prompts, self.origins)
        if self._recording:
            clone.activate_past_recording()
        return clone

    @property
    def _length(self) -> int:
        return self.get_seq_length()

    @property
    def is_linear(self) -> list[bool]:
        """Whether a layer has a state and no keys: False for all if it were True for all.

        The library would compute a prompt from its first token again, because it does not expect
        a cache without keys to know its length.
        """
        linear = super().is_linear
        return [False] * len(linear) if all(linear) else linear

    def repeated(self, input_ids: Tensor | None) -> int:
        """Return how many columns of a pass to come are held already, of one with all of them.

        Assisted decoding begins with such a pass, whatever its cache holds.
        """
        start, columns = self._length, self._prompts.ids.shape[1]
        if input_ids is None or not 0 < start < columns <= input_ids.shape[1]:
            return 0
        prompts = self._prompts.ids[self.origins].to(input_ids.device)
        return start if torch.equal(prompts, input_ids[:, :columns]) else 0

    def note(self, input_ids: Tensor | None, attention_mask: Tensor | None) -> None:
        """Note the ids of the pass to come. Nothing has been computed yet.

        Raises: ValueError for tokens that are not those of the prompts, or hide other padding;
            ShapeError for another number of rows.
        """
        start = self._length
        # Also where the last pass failed, or another prefix cache of the model has noted this one.
        self._cut(start)
        if input_ids is None:
            return  # embeddings, of which nobody knows the ids: nothing behind them is named
        if len(input_ids) != len(self.origins):
            raise ShapeError(
                f"this session has {len(self.origins)} rows; got {len(input_ids)}. Begin one with "
                "rows=num_beams, or num_return_sequences, or with all prompts of the batch."
            )
        if start < self._prompts.ids.shape[1]:
            self._check_prompts(start, input_ids, attention_mask)
        if self._noted == start:
            self._ids.append(input_ids.clone())  # the caller may use the tensor again
            self._noted += input_ids.shape[1]

    def _check_prompts(self, start: int, ids: Tensor, attention_mask: Tensor | None) -> None:
        wanted = self._prompts.ids[self.origins, start:][:, : ids.shape[1]].to(ids.device)
        padding = torch.tensor(self._prompts.padding, device=ids.device)[self.origins, None]
        positions = torch.arange(start, start + wanted.shape[1], device=ids.device)
        other = (wanted != ids[:, : wanted.shape[1]]) & (positions >= padding)
        if bool(other.any()):
            raise ValueError(
                f"a session is for its prompts; the model got other tokens at {start}. Pass the "
                "same input_ids to generate, or begin another session."
            )
        if any(self._prompts.padding) and (
            attention_mask is None
            or bool((attention_mask[:, :start].sum(-1, keepdim=True) + padding != start).any())
        ):
            raise ValueError(
                "prompts of unequal length need the attention_mask in generate, too; got another, "
                "or none."
            )

    def _cut(self, columns: int) -> None:
        """Forget ids of tokens that were taken back, or never computed."""
        if columns < self._noted:
            self._ids, self._noted = [self._known[:, :columns]], columns

    @property
    def _known(self) -> Tensor:
        if len(self._ids) > 1:
            self._ids = [torch.cat([ids.to(self._ids[0].device) for ids in self._ids], -1)]
        return self._ids[0]

    def generated(self, row: int) -> list[int]:
        """Return the ids behind the prompt in a row, as far as they are known and held."""
        self._cut(self._length)
        ids: list[int] = self._known[row, self._prompts.ids.shape[1] :].tolist()
        return ids

    # Rows.

    def _select(self, rows: list[int]) -> None:
        ids, origins = [self._known[rows]], [self.origins[row] for row in rows]
        super()._select(rows)
        self._ids, self.origins = ids, origins


def check_joined(prompts: Prompts, media: object) -> None:
    """Raise NotSupportedError unless prompts can be computed alone, and go on as one batch."""
    if media:
        raise NotSupportedError(
            "media are of a single prompt in one row; got several rows. Use a session for each."
        )
    columns = prompts.ids.shape[1]
    if columns > 1 and columns - 1 in prompts.padding:
        raise NotSupportedError(
            "prompts of unequal length have two tokens or more; got one of a single token. Leave "
            "it out of the batch."
        )
