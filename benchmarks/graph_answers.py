"""The cost of semantic outputs in an ONNX graph compared with logits, in ONNX Runtime on this machine's CPU.

    python benchmarks/graph_answers.py [RUNS] [THREADS] [MODEL IMAGES]

fai-mf-m-ade at 640x640, batch 1: the graph with logits, the graph with semantic outputs that `faim2f export onnx`
writes, and the same with all classes compared at every pixel, as in engines. With random weights, nearly all of the 150
classes could win somewhere, so few can be skipped. Semantic outputs are therefore also computed from the realistic
logits of `post_processing.py`, in which 14 queries are confident in a class: the network still runs, but its logits are
replaced. All run in turn in one process; the label maps are compared.

With the path of a trained MODEL, its graphs for images of any size run on every tenth photograph in IMAGES instead,
each at the size that its image processor chooses.
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
from PIL import Image
from post_processing import realistic_logits
from transformers.utils import logging

from hf_faim2f import FaiM2FForUniversalSegmentation, FaiM2FImageProcessor, load_config
from hf_faim2f.export.candidates import keep_all
from hf_faim2f.export.graph_file import layers_with_weights, logits_of, name_nodes
from hf_faim2f.export.onnx import export_onnx
from hf_faim2f.model.image_files_faim2f import IMAGE_FORMATS

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


def graphs_of(model: Path, folder: Path, size: tuple[int, int] | None) -> dict[str, Any]:
    graphs = {}
    for kind in ("logits", "semantic"):
        export_onnx(model, folder / kind, outputs=kind, size=size, batch=1, verify=False)
        graphs[kind] = onnx.load(folder / kind / "model.onnx")
    name_nodes(graphs["semantic"])
    graphs["semantic, all classes"] = graphs["semantic"].FromString(graphs["semantic"].SerializeToString())
    keep_all(graphs["semantic, all classes"])
    return graphs


def untrained(folder: Path) -> dict[str, Any]:
    torch.manual_seed(0)
    network = FaiM2FForUniversalSegmentation(load_config(MODEL)).eval()
    network.save_pretrained(folder / "model")
    FaiM2FImageProcessor.from_model_config(network.config).save_pretrained(folder / "model")
    graphs = graphs_of(folder / "model", folder, SIZE)
    plain = graphs["semantic, all classes"]
    classes, masks = (tensor.numpy() for tensor in realistic_logits(network.config.num_labels))
    ends = logits_of(plain, "semantic", layers_with_weights(plain), folder / "semantic" / "model.onnx")
    given = dict(zip(ends, (classes, masks.reshape(*masks.shape[:2], -1)), strict=True))
    return graphs | {
        "realistic": with_logits(graphs["semantic"], given),
        "realistic, all classes": with_logits(plain, given),
    }


def images_for(model: Path, folder: Path) -> list[np.ndarray]:
    processor = FaiM2FImageProcessor.from_pretrained(model)
    found = []
    for path in sorted(folder.iterdir())[::10]:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            found.append(processor(image.convert("RGB"), return_tensors="np")["pixel_values"])
    return found


def main() -> None:
    runs, threads = (int(sys.argv[i]) if len(sys.argv) > i else default for i, default in ((1, 9), (2, 2)))
    model = Path(sys.argv[3]) if len(sys.argv) > 3 else None
    print(__doc__)
    logging.disable_progress_bar()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    with tempfile.TemporaryDirectory(prefix="faim2f-") as folder:
        graphs = graphs_of(model, Path(folder), None) if model else untrained(Path(folder))
        sessions = {
            name: onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
            for name, graph in graphs.items()
        }
    images = images_for(model, Path(sys.argv[4])) if model else [torch.randn(1, 3, *SIZE).numpy()]

    def predict(name: str) -> list[np.ndarray]:
        return [sessions[name].run(None, {"pixel_values": pixels})[0] for pixels in images]

    seconds = time_in_turn({name: partial(predict, name) for name in sessions}, runs, threads=threads)
    costs = {}
    for name, figures in seconds.items():
        costs[name] = {key: figures[key] / seconds["logits"][key] - 1 for key in ("median", "min")}
        cost = ", ".join(f"{key} {value:+.1%}" for key, value in costs[name].items())
        print(f"{row(name, figures)}   on top of the logits: {cost}")
    differing = {}
    for name in ["semantic", "realistic"][: 1 if model else 2]:
        pairs = list(zip(predict(name), predict(f"{name}, all classes"), strict=True))
        differing[name] = sum(int((ours != theirs).sum()) for ours, theirs in pairs)
        total = sum(ours.size for ours, _ in pairs)
        print(f"{name}: {differing[name]} of {total} pixels differ from those of all classes")
    given = {"runs": runs, "trained": model is not None, "images": len(images)}
    record("graph_answers", given | {"seconds": seconds, "costs": costs, "differing": differing}, threads)


if __name__ == "__main__":
    main()
