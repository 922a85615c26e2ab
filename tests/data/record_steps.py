"""Writes steps.bundle and steps.npz; see README.md. `python tests/data/record_steps.py` from the project's root."""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

import framestep
from framestep.calibration.calibrate import CalibrationOptions, calibrate
from framestep.calibration.clips import Clip
from framestep.export.checkpoint import read_checkpoint
from framestep.export.export import ExportOptions, export_streamformer
from framestep.export.labelling import LabelOptions
from framestep.runtime.bundle import Bundle

DATA = Path(__file__).parent
BUNDLE = DATA / "steps.bundle"
OUTPUTS = ("features", "pooled", "scores", "patch_scores")
SEED = 11


def make_bundle(frames: np.ndarray) -> None:
    """The golden checkpoint with window 8, three labels and INT8 beside float32."""
    rows = np.random.default_rng(SEED).standard_normal((2, 3, 96)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=-1, keepdims=True)
    numbers = {"logit_scale": np.array(2.0, np.float32), "logit_bias": np.array(-0.5, np.float32)}
    with tempfile.TemporaryDirectory() as folder:
        embeddings = Path(folder) / "labels.safetensors"
        save_file({"text_embeddings": rows[0], "patch_text_embeddings": rows[1], **numbers}, embeddings)
        labels = LabelOptions(("a", "b", "c"), text_embeddings=embeddings, background="c")
        checkpoint = read_checkpoint(str(DATA / "streamformer-tiny"))
        plain = export_streamformer(checkpoint, Path(folder) / "plain.bundle", ExportOptions(window=8), labels).path
        clips = [Clip("golden", frames)]
        shutil.rmtree(BUNDLE, ignore_errors=True)
        calibrate(Bundle.open(plain), clips, clips, BUNDLE, CalibrationOptions(keep_float=True, drift_frames=0))
    bundle = Bundle.open(BUNDLE)
    graphs = {"report.json", "report.md", *(name for name in bundle.manifest.files if name.endswith(".png"))}
    for name in graphs & set(bundle.manifest.files):  # nothing at run time reads them
        bundle.file(name).unlink()
        del bundle.manifest.files[name]
    bundle.rewrite_manifest(bundle.manifest)


def record(precision: str, frames: np.ndarray) -> dict[str, np.ndarray]:
    """Outputs and positions of three streams that advance alone and together, past the window's end."""
    generator = np.random.default_rng(SEED)
    advance = generator.random((30, 3)) < 0.7
    found: dict[str, list[np.ndarray]] = {name: [] for name in OUTPUTS}
    positions = []
    with framestep.load(BUNDLE, engine="onnxruntime", streams=3, outputs=OUTPUTS, precision=precision) as session:
        streams = [session.open_stream() for _ in range(3)]
        for row in advance:
            chosen = [stream for stream, go in zip(streams, row, strict=True) if go]
            results = session.step({stream: frames[(7 * stream.slot + stream.position) % 40] for stream in chosen})
            for stream in chosen:
                positions.append([stream.slot, results[stream].position])
                for name in OUTPUTS:
                    found[name].append(results[stream][name])
    made = {f"{precision}_{name}": np.stack(arrays) for name, arrays in found.items() if name != "features"}
    made[f"{precision}_features"] = np.stack(found["features"])[:, ::5]  # every fifth patch
    return {"advance": advance, "streams_and_positions": np.array(positions), **made}


if __name__ == "__main__":
    with np.load(DATA / "streamformer-tiny" / "golden.npz") as arrays:
        golden = arrays["frames"]
    if "--keep-bundle" not in sys.argv:
        make_bundle(golden)
    np.savez_compressed(
        DATA / "steps.npz",
        **record("fp32", golden),
        **{name: array for name, array in record("int8", golden).items() if name.startswith("int8")},
    )
