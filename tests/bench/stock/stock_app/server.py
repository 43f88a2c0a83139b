"""Flower's own round loop. The only addition is a time stamp when a round's aggregate is there."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

SHAPES = {"decoder.weight": (900, 960), "decoder.bias": (960,), "tail.weight": (40, 960), "tail.scale": (1,)}

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run `rounds` rounds over `sites` nodes, all of them in every round, training only."""
    config = context.run_config
    sites, marks = int(config["sites"]), Path(str(config["marks"]))

    def mark(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        with marks.open("a") as file:
            file.write(f"{server_round} {time.time()}\n")
        return MetricRecord({"round": server_round})

    strategy = FedAvg(
        fraction_train=1.0,
        fraction_evaluate=0.0,
        min_train_nodes=sites,
        min_evaluate_nodes=0,
        min_available_nodes=sites,
    )
    random = np.random.default_rng(0)
    head = {name: Array(random.normal(0, 0.1, shape).astype(np.float32)) for name, shape in SHAPES.items()}
    strategy.start(grid=grid, initial_arrays=ArrayRecord(head), num_rounds=int(config["rounds"]), evaluate_fn=mark)
