"""vLLM's example hidden-state connector without files and CUDA, for `benchmarks.hidden_states`."""

from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.v1 import example_hidden_states_connector as example

KEPT: dict[str, torch.Tensor] = {}
"""Request id -> hidden states, of the process that runs the model."""


class KeptStates(example.ExampleHiddenStatesConnector):
    """Copies a finished request's states out of their cache into this process's memory."""

    def _submit_async_write(self, pending: Any) -> None:
        cache, size = self._kv_cache, self._block_size
        assert cache is not None
        blocks = torch.tensor(pending.block_ids, dtype=torch.long)[:, None] * size
        slots = (blocks + torch.arange(size)).flatten()
        KEPT[pending.req_id] = example.extract_from_kv_cache(cache, slots, len(pending.token_ids))
        done: Any = _Done()
        self._req_copy_events[pending.req_id] = done


class _Done:
    """Stands for a CUDA event that has happened."""

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass
