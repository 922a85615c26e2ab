"""TensorRT-RTX takes StreamChat's graphs with FP16 products, ahead of time, on a machine without a GPU."""

from __future__ import annotations

from collections import Counter

import pytest
import streamchat_models

trt = pytest.importorskip("tensorrt_rtx")

from tensorrt_bundles import NoProgress, readers_of_caches  # noqa: E402

from framestep.export.streamchat_checkpoint import read_streamchat_checkpoint  # noqa: E402
from framestep.export.streamchat_export import StreamChatOptions, write_bundle  # noqa: E402
from framestep.export.tensorrt import build  # noqa: E402
from framestep.export.tensorrt_network import BuildOptions  # noqa: E402
from framestep.runtime.bundle import Bundle, BundleWriter  # noqa: E402

BLOCKS, LAYERS = len(streamchat_models.CROSS), streamchat_models.LAYERS
# KV-cache layers, attention layers
NATIVE = {
    "frame": (2 * BLOCKS, streamchat_models.VISION["num_hidden_layers"]),
    "decoder": (3 * LAYERS, LAYERS + BLOCKS),
    "rebase": (LAYERS, 0),
    "rebase_frames": (BLOCKS, 0),
    "embed": (0, 0),
}


@pytest.fixture(scope="module", params=["fp16", "fp16+w4"])
def built(tmp_path_factory, request):
    folder = tmp_path_factory.mktemp("tensorrt")
    checkpoint = read_streamchat_checkpoint(str(streamchat_models.save(folder, max_position_embeddings=512)))
    with BundleWriter(folder / "out.bundle") as writer:
        write_bundle(checkpoint, writer, StreamChatOptions(request.param, window=3, rate=2.0, capacity=64, chunk=32))
    options = BuildOptions(None, 1, "tensorrt_rtx", ("8.6",))
    return build(Bundle.open(folder / "out.bundle"), options, NoProgress())


def test_graphs_build_with_native_caches_and_fused_attention(built) -> None:
    _, report = built
    found = {item.graph: (item.network.cache_updates, item.network.attentions) for item in report.graphs}
    assert found == NATIVE
    assert all(item.fused == item.network.attentions for item in report.graphs)
    assert report.notes == ()


def test_text_reads_text_and_frames_where_they_are(built) -> None:
    bundle, report = built
    plan = bundle.file(next(item.file for item in report.graphs if item.graph == "decoder")).read_bytes()
    read = Counter(readers_of_caches(plan))
    assert read.pop("_gemv_mha_v1") == LAYERS + BLOCKS
    # several tokens copy each cache once
    assert sum(read.values()) == 2 * (LAYERS + BLOCKS) and not any("Repl" in name for name in read)
