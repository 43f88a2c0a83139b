"""A fit that costs nothing: what is timed is the way there and back."""

from __future__ import annotations

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Move every value a little and send the head back."""
    received = message.content["arrays"]
    moved = {name: Array(array.numpy() + np.float32(1e-3)) for name, array in received.items()}
    metrics = MetricRecord({"num-examples": 1})
    return Message(content=RecordDict({"arrays": ArrayRecord(moved), "metrics": metrics}), reply_to=message)
