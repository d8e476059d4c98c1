"""Features of a site's shard under the run's model: from memory, the cache, or the extraction by its process group."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fedhds.errors import ModelError, TaskError
from fedhds_client.computation import Cancelled, Control
from fedhds_client.data.prompts import Prompter
from fedhds_client.data.row_formats import Row
from fedhds_client.data.shard import Shard
from fedhds_client.distributed.process_group import Extract, ProcessGroup
from fedhds_client.features.cache import cached_features
from fedhds_client.features.extraction import Features, extract_features, mean_states
from fedhds_client.features.projection import FeatureSpace
from fedhds_client.features.public_rows import PUBLIC_ROWS
from fedhds_client.models.adapter import AdapterModel
from fedhds_client.models.fingerprint import digest_of, fingerprint
from fedhds_client.models.loading import load_base_model
from fedhds_client.models.template_trial import try_template

if TYPE_CHECKING:
    import torch

    from fedhds.spec import RunSpec
    from fedhds_client.settings import ClientSettings
    from fedhds_client.site import Site

logger = logging.getLogger(__name__)


class ShardFeatures:
    """Takes features with the run's feature model, or with the base model under the adapter of the task."""

    def __init__(
        self, settings: ClientSettings, spec: RunSpec, model: AdapterModel, prompter: Prompter, group: ProcessGroup
    ) -> None:
        self._model, self._prompter, self._group = model, prompter, group
        self._space = FeatureSpace.of(spec)
        self._batch_size = settings.inference_batch_size
        self._body = model.base
        self._own = bool(spec.selection.features.model)
        # By site: features of the last key. A strategy of many steps asks again within the second.
        self._recent: dict[str, tuple[str, Features]] = {}
        # The centers of the last key.
        self._public: tuple[str, dict[int, torch.Tensor]] | None = None
        if self._own:
            logger.info("loading the feature model %s", spec.selection.features.model)
            try:
                self._body = load_base_model(
                    spec.selection.features.model, device=settings.device, cache_dir=settings.state, body_only=True
                )
            except ModelError as error:
                message = f"--feature-model, which the operator of the coordinator sets: {error}"
                raise ModelError(message) from error
            if spec.model.prompt_format != "alpaca":
                try_template(spec.selection.features.model, self._body.tokenizer, settings.state)
            length = min(spec.model.max_length, self._body.max_length)
            self._prompter = Prompter(self._body.tokenizer, max_length=length, prompt_format=spec.model.prompt_format)

    @property
    def proof(self) -> str:
        """Digest of the feature model and how it is used; empty where that is the base model."""
        if not self._own:
            return ""
        return digest_of(fingerprint(self._body, self._prompter.fingerprint))

    def of(self, site: Site, index: int, adapter: Path, control: Control) -> Features:
        """Features of the shard of `site`, which is this process's with that `index`.

        Raises TaskError, and Cancelled when `control` says so.
        """
        shard = site.shard
        if shard is None:
            raise TaskError("this site has no training rows to take features of")
        key = self._key(adapter)
        recent = self._recent.get(site.name)
        if recent and recent[0] == key:
            return recent[1]

        def extract(rows: Sequence[int]) -> Features:
            logger.info("%s: taking the features of %d rows", site.name, len(rows))

            def progress(share: float) -> None:
                control.report(share)
                # With workers it runs to its end: they would not learn of it.
                if control.cancelled() and self._group.size == 1:
                    raise Cancelled("the extraction of features was stopped")

            content = b"" if self._own else adapter.read_bytes()
            self._group.broadcast(Extract(index, tuple(rows), content))
            values = self._group.gather(rows, lambda share: self.extract(shard, share, adapter, progress).values)
            return Features(np.asarray(rows, dtype=np.int64), values)

        features = cached_features(
            site.folder / "features",
            key=key,
            encode=lambda row: self._encode(shard[row]),
            ids=range(len(shard)),
            dimension=self._space.dimension,
            extract=extract,
            note=lambda text: logger.warning("%s: %s", site.name, text),
        )
        self._recent[site.name] = (key, features)
        return features

    def of_others(self, rows: Shard, adapter: Path) -> Features:
        """Features of a few rows that are no site's shard, taken in this process and not kept; raises as `of` does."""
        return self.extract(rows, range(len(rows)), adapter)

    def release(self, site: str) -> None:
        """Frees the memory that a site's features take."""
        self._recent.pop(site, None)

    def extract(
        self,
        shard: Shard,
        rows: Sequence[int],
        adapter: Path,
        progress: Callable[[float], None] = lambda share: None,
    ) -> Features:
        """Extracts the features of `rows` in this process; raises TaskError, AdapterError and ModelError."""
        if not self._own:
            self._model.load(adapter)
        return extract_features(
            self._body.model if self._own else self._model.module,
            lambda row: self._encode(shard[row]),
            rows,
            self._space,
            pad_id=self._pad_id,
            batch_size=self._batch_size,
            progress=progress,
            centers=self._centers(adapter) if self._space.centered else None,
        )

    @property
    def _pad_id(self) -> int:
        return int(self._body.tokenizer.pad_token_id or 0)

    def _key(self, adapter: Path) -> str:
        """All that features depend on besides a row's tokens."""
        parts = [self._body.weights, "" if self._own else adapter.name, self._space.key, str(self._body.model.dtype)]
        if self._space.centered:
            # The tokens of the public rows.
            parts += [self._prompter.fingerprint, str(self._prompter.max_length)]
        return "/".join(parts)

    def _centers(self, adapter: Path) -> dict[int, torch.Tensor]:
        """Per layer the mean over the public rows, under the model that the rows' features are taken with."""
        key = self._key(adapter)
        if self._public is None or self._public[0] != key:
            rows = [Row(number, question, "", answer) for number, (question, answer) in enumerate(PUBLIC_ROWS)]
            means = mean_states(
                self._body.model if self._own else self._model.module,
                [self._encode(row) for row in rows],
                self._space,
                pad_id=self._pad_id,
                batch_size=self._batch_size,
            )
            self._public = key, means
        return self._public[1]

    def _encode(self, row: Row) -> list[int]:
        encoded = self._prompter.encode(row)
        if self._space.pooling == "prompt-last":
            # A row without a prompt still has one token.
            return encoded.input_ids[: max(1, encoded.answer_start)]
        end = self._prompter.end_id
        if encoded.truncated and end is not None:
            # All rows end alike: else the last token's state says first of all whether a row was cut. On Dolly, where
            # 16 % of the rows are, 98 % of the picks were, and they covered the pool worse than a random draw.
            return [*encoded.input_ids[:-1], end]
        return encoded.input_ids
