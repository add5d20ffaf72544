"""The peer of `bench.cluster_start`: a model trained as Ray's documentation writes it, with nothing of this library.
Two workers take steps on random tokens; when the second one has ended, the time is written to a file.

    python bench/plain_ray_train.py CONFIG.json FILE INTERFACE

Gloo has to be told the network interface where a host's name has the address 127.0.1.1, as Debian and Ubuntu set it: it
listens at that one, and the script would wait for ever.
"""

import json
import sys
import time
from pathlib import Path

import ray.train
import ray.train.torch
import torch
import transformers
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer

VOCABULARY, ROWS, LENGTH = 4096, 2, 16


def worker(config: dict[str, str]) -> None:
    described = transformers.AutoConfig.for_model(**json.loads(config["model"]), vocab_size=VOCABULARY)
    model = ray.train.torch.prepare_model(transformers.AutoModelForCausalLM.from_config(described))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        ids = torch.randint(VOCABULARY, (ROWS, LENGTH), device=ray.train.torch.get_device())
        model(input_ids=ids, labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    if ray.train.get_context().get_world_rank() == 0:
        file = Path(config["file"])
        file.with_suffix(".new").write_text(str(time.time()))
        file.with_suffix(".new").rename(file)


if __name__ == "__main__":
    config, file, interface = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    TorchTrainer(
        worker,
        train_loop_config={"model": config.read_text(), "file": str(file)},
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(  # type: ignore[call-arg]  # the older one is declared
            name="plain",
            storage_path=str(file.parent / "plain"),
            worker_runtime_env={"env_vars": {"GLOO_SOCKET_IFNAME": interface}},
        ),
    ).fit()
