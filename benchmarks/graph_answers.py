"""The cost of semantic outputs in an ONNX graph compared with logits, in ONNX Runtime on this machine's CPU.

    python benchmarks/graph_answers.py [RUNS] [THREADS]

fai-mf-m-ade at 640x640, batch 1: the graph with logits, the graph with semantic outputs that `faim2f export onnx`
writes, and the same with all classes compared at every pixel, as in engines. With random weights, nearly all of the 150
classes could win somewhere, so few can be skipped. Semantic outputs are therefore also computed from the realistic
logits of `post_processing.py`, in which 14 queries are confident in a class: the network still runs, but its logits are
replaced. All run in turn in one process; the label maps are compared.
"""

import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from measurement import record, row, time_in_turn
from post_processing import realistic_logits
from transformers.utils import logging

from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor, load_config
from hf_faim2f.export.candidates import keep_all
from hf_faim2f.export.graph_file import layers_with_weights, logits_of, name_nodes
from hf_faim2f.export.onnx import export_onnx

MODEL, SIZE = "fai-mf-m-ade", (640, 640)


def with_logits(model: Any, given: dict[str, np.ndarray]) -> Any:
    """A copy of a graph with the given logits; the network's, times zero, are added so that it still runs."""
    changed = model.FromString(model.SerializeToString())
    changed.graph.initializer.append(onnx.numpy_helper.from_array(np.zeros((), np.float32), "nothing"))
    for name, values in given.items():
        changed.graph.initializer.append(onnx.numpy_helper.from_array(values, f"{name}_given"))
        place, node = next((i, n) for i, n in enumerate(changed.graph.node) if name in n.output)
        node.output[:] = [f"{made}_own" if made == name else made for made in node.output]
        pairs = [("Mul", [f"{name}_own", "nothing"], f"{name}_zero"), ("Add", [f"{name}_zero", f"{name}_given"], name)]
        for step, (kind, inputs, output) in enumerate(pairs, 1):
            changed.graph.node.insert(place + step, onnx.helper.make_node(kind, inputs, [output]))
    return changed


def contenders(folder: Path, threads: int) -> dict[str, onnxruntime.InferenceSession]:
    torch.manual_seed(0)
    network = FaiM2FForUniversalSegmentation(load_config(MODEL)).eval()
    network.save_pretrained(folder / "model")
    FaiM2FImageProcessor.from_model_config(network.config).save_pretrained(folder / "model")
    graphs = {}
    for kind in ("logits", "semantic"):
        export_onnx(folder / "model", folder / kind, outputs=kind, size=SIZE, batch=1, verify=False)
        graphs[kind] = onnx.load(folder / kind / "model.onnx")
    name_nodes(graphs["semantic"])
    plain = graphs["semantic"].FromString(graphs["semantic"].SerializeToString())
    keep_all(plain)
    classes, masks = (tensor.numpy() for tensor in realistic_logits(network.config.num_labels))
    ends = logits_of(plain, "semantic", layers_with_weights(plain), folder / "semantic" / "model.onnx")
    given = dict(zip(ends, (classes, masks.reshape(*masks.shape[:2], -1)), strict=True))
    graphs |= {
        "semantic, all classes": plain,
        "realistic": with_logits(graphs["semantic"], given),
        "realistic, all classes": with_logits(plain, given),
    }
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    return {
        name: onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        for name, graph in graphs.items()
    }


def main() -> None:
    runs, threads = (int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, 9), (2, 2)))
    print(__doc__)
    logging.disable_progress_bar()
    pixels = {"pixel_values": torch.randn(1, 3, *SIZE).numpy()}
    with tempfile.TemporaryDirectory(prefix="faim2f-") as folder:
        sessions = contenders(Path(folder), threads)
    seconds = time_in_turn({name: partial(s.run, None, pixels) for name, s in sessions.items()}, runs, threads=threads)
    costs = {}
    for name, figures in seconds.items():
        costs[name] = {key: figures[key] / seconds["logits"][key] - 1 for key in ("median", "min")}
        cost = ", ".join(f"{key} {value:+.1%}" for key, value in costs[name].items())
        print(f"{row(name, figures)}   on top of the logits: {cost}")
    differing = {}
    for name in ("semantic", "realistic"):
        ours, theirs = (sessions[key].run(None, pixels)[0] for key in (name, f"{name}, all classes"))
        differing[name] = int((ours != theirs).sum())
        print(f"{name}: {differing[name]} of {ours.size} pixels differ from those of all classes")
    record("graph_answers", {"runs": runs, "seconds": seconds, "costs": costs, "differing": differing}, threads)


if __name__ == "__main__":
    main()
