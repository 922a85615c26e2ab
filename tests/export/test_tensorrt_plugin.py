"""Our kernel as a TensorRT plugin, up to the builder's call: the kernel, its PTX, its launch, and the changed network."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
import types
import typing
from dataclasses import replace
from pathlib import Path

import pytest
import torch

trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")

from tensorrt_bundles import NoProgress  # noqa: E402

from framestep.benchmarks.gpu.stand_in import stand_in  # noqa: E402
from framestep.export.half import add_half  # noqa: E402
from framestep.export.tensorrt import build  # noqa: E402
from framestep.export.tensorrt_network import BuildOptions  # noqa: E402
from framestep.export.tensorrt_plugin import INPUTS, OUTPUTS, mark_sites, register  # noqa: E402
from framestep.kernels import reference  # noqa: E402
from framestep.runtime.bundle import Bundle  # noqa: E402
from framestep.runtime.errors import EngineError  # noqa: E402

CAPABILITIES = (80, 87, 90, 110)


@pytest.fixture(scope="module")
def compiled():
    """`compile_plugin` for each GPU, in a process where Triton compiles: here its functions may be interpreted."""
    script = """
import json, sys
from dataclasses import asdict
from framestep.kernels.temporal_plugin import compile_plugin
found = {name: asdict(compile_plugin(2352, 16, 64, "fp16", 1.0, name)) for name in json.loads(sys.argv[1])}
print(json.dumps(found))
"""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", script, json.dumps(CAPABILITIES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_kernel_attends_over_the_rings_and_updates_them(dtype) -> None:
    import triton

    from framestep.kernels.temporal_plugin import constants, temporal_plugin

    if isinstance(temporal_plugin, triton.runtime.JITFunction) and not torch.cuda.is_available():
        pytest.skip("Triton was imported without its interpreter, and there is no GPU")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    streams, rows, window, size, scale = 3, 10, 6, 16, 0.25
    generator = torch.Generator(device).manual_seed(0)
    shape = (streams, rows, size)
    query, key, value = (torch.randn(shape, generator=generator, device=device).to(dtype) for _ in range(3))
    rings = [torch.randn((streams, rows, window, size), generator=generator, device=device).to(dtype) for _ in range(2)]
    position = torch.tensor([0, 4, 13], device=device)
    copies = [ring.double() for ring in rings]
    wide = [x.double()[:, :, None] for x in (query, key, value)]  # rows as patches of one head
    expected = reference.temporal_attention(*wide, *copies, position, scale)[:, :, 0]
    out = torch.empty_like(query)
    fixed = constants(rows, window, size, query.element_size(), scale)
    grid = (triton.cdiv(rows, fixed["BLOCK_R"]), 1, streams)
    temporal_plugin[grid](query, key, value, *rings, position, out, *rings, **fixed, num_warps=2)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-3
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance)
    for ring, copy in zip(rings, copies, strict=True):
        torch.testing.assert_close(ring.double(), copy, rtol=0, atol=0)


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_the_ptx_takes_the_pointers_that_tensorrt_passes_and_no_more(compiled, capability) -> None:
    found = compiled[str(capability)]
    entry = found["ptx"][found["ptx"].index(".entry") :]
    assert f".target sm_{capability}" in found["ptx"]
    assert found["entry"] in entry[: entry.index("(")]
    assert entry[: entry.index(")")].count(".param") == 9
    assert f".reqntid {found['threads']}" in entry
    assert found["grid_x"] * (2352 // found["grid_x"]) == 2352
    assert found["shared_bytes"] > 0


class Desc:
    """What stands for `tensorrt.plugin.TensorDesc`."""

    def __init__(self, shape, dtype, aliased_to=None) -> None:
        self.shape_expr = [types.SimpleNamespace(constant_value=n) if isinstance(n, int) else n for n in shape]
        self.shape, self.dtype, self.aliased_to = shape, dtype, aliased_to

    def like(self):
        return Desc(self.shape, self.dtype)

    def aliased(self):
        return Desc(self.shape, self.dtype, self)


@pytest.fixture
def plugins(monkeypatch):
    """What stands for `tensorrt.plugin`: it keeps what is registered, and what is created."""
    module = types.ModuleType("tensorrt.plugin")
    module.TensorDesc, module.created = Desc, []
    module.op = types.SimpleNamespace()
    module.KernelLaunchParams = module.SymExprs = types.SimpleNamespace
    module.SymIntExprs = lambda length: [None] * length

    def keep(kind):
        def decorator(identity):
            def wrap(function):
                namespace, name = identity.split("::")
                setattr(module, kind, function)

                def create(*tensors, **attributes):
                    module.created.append((name, tensors, attributes))
                    return tensors

                setattr(module.op, namespace, types.SimpleNamespace(**{name: create}))
                return function

            return wrap

        return decorator

    module.register, module.aot_impl = keep("describe"), keep("implement")
    monkeypatch.setitem(sys.modules, "tensorrt.plugin", module)
    return module


def test_rings_are_declared_as_their_own_outputs_memory(plugins, monkeypatch) -> None:
    monkeypatch.setattr(
        "framestep.kernels.temporal_plugin.compile_plugin", lambda *sizes: types.SimpleNamespace(
            entry="temporal", ptx=repr(sizes), threads=64, shared_bytes=1024, grid_x=12
        )
    )  # fmt: skip
    package = types.ModuleType("tensorrt")
    package.DataType = trt.DataType
    register(package, 0.5, 87)
    row, ring = Desc(("S", 64, 1, 24), trt.DataType.HALF), Desc(("S", 64, 16, 24), trt.DataType.HALF)
    rings = ring, Desc(("S", 64, 16, 24), trt.DataType.HALF)
    out, keys, values = plugins.describe(row, row, row, *rings, Desc(("S",), trt.DataType.INT64))
    assert (out.shape, out.aliased_to) == (row.shape, None)
    assert keys.aliased_to is rings[0] and values.aliased_to is rings[1]
    assert all(isinstance(item.annotation, type) for item in inspect.signature(plugins.describe).parameters.values())
    assert len(typing.get_args(inspect.signature(plugins.implement).return_annotation)) == 4  # TensorRT wants them
    entry, ptx, launch, extra = plugins.implement(row, row, row, *rings, None, (out, keys, values), None)
    assert (entry, ptx, extra) == ("temporal", repr((64, 16, 24, "fp16", 0.5, 87)), [])
    assert (launch.grid_x, launch.grid_y, launch.grid_z) == (12, 1, "S")
    assert (launch.block_x, launch.shared_mem) == (64, 1024)


@pytest.fixture
def asked(plugins, monkeypatch) -> dict[str, list]:
    """Networks that take plugins: identities of the right shapes stand for them, and TensorRT for RTX builds them."""
    found: dict[str, list] = {"plugins": [], "features": []}

    def add_plugin(network, tensors, aot):
        found["plugins"].append(aot)
        made = [network.add_identity(tensors[INPUTS.index(name)]).get_output(0) for name in OUTPUTS]
        return types.SimpleNamespace(name="", get_output=made.__getitem__)

    monkeypatch.setattr(trt.INetworkDefinition, "add_plugin", add_plugin, raising=False)
    monkeypatch.setattr(
        trt.IBuilderConfig, "set_preview_feature", lambda config, *given: found["features"].append(given)
    )
    return found


@pytest.fixture(scope="module")
def half(golden_bundle, tmp_path_factory) -> Path:
    """The goldens' model with fp16."""
    path = tmp_path_factory.mktemp("half") / "golden.bundle"
    shutil.copytree(golden_bundle, path)
    add_half(Bundle.open(path))
    return path


@pytest.fixture
def copied(half, tmp_path) -> Path:
    return shutil.copytree(half, tmp_path / "golden.bundle")


OPTIONS = BuildOptions("fp16", 2, "tensorrt")
quiet_cache = pytest.mark.filterwarnings("ignore:.*iming cache:DeprecationWarning")


@quiet_cache
def test_a_build_puts_one_plugin_in_the_place_of_each_pair_of_rings(copied, plugins, asked) -> None:
    with stand_in(copied, flavour="tensorrt"):
        bundle, report = build(Bundle.open(copied), replace(OPTIONS, attention="triton"), NoProgress())
    assert asked["plugins"] == [True] * 3
    assert asked["features"] == [(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)]
    network = report.graphs[0].network
    assert (network.cache_updates, network.copied_states, network.attentions) == (6, (), 4)  # the others stay
    assert bundle.manifest.engines[report.graphs[0].file].attention == "triton"
    name, tensors, attributes = plugins.created[0]
    assert [tensor.name for tensor in tensors[3:]] == ["layer0.key.past", "layer0.value.past", "position"]
    assert (name, attributes) == ("temporal_attention_86_3f800000", {})  # NumPy breaks what TensorRT does with them
    assert [made for made, _, _ in plugins.created] == [name] * 3


@quiet_cache
@pytest.mark.parametrize("faster", ["native", "triton"])
def test_auto_keeps_the_attention_that_was_faster(copied, asked, monkeypatch, faster) -> None:
    def step_ms(flat, item, streams):
        assert streams == 2
        return [1.0 if flat.manifest.engines[item.file].attention == faster else 2.0]

    monkeypatch.setattr("framestep.export.tensorrt._step_ms", step_ms)
    with stand_in(copied, flavour="tensorrt"):
        bundle, report = build(Bundle.open(copied), replace(OPTIONS, attention="auto"), NoProgress())
    backbone, *labels = report.graphs
    assert bundle.manifest.engines[backbone.file].attention == faster
    assert backbone.step_ms == {
        "native": 1.0 if faster == "native" else 2.0,
        "triton": 3.0 - backbone.step_ms["native"],
    }
    assert all(bundle.manifest.engines[item.file].attention == "native" and not item.step_ms for item in labels)
    assert {f"engines/{file.name}" for file in (copied / "engines").iterdir()} == set(bundle.manifest.engines)
    assert len(bundle.manifest.engines) == 3
    assert next(note for note in report.notes if "is kept" in note).endswith(f"{faster} is kept")


@quiet_cache
def test_auto_measures_both_in_turn_as_a_session_runs_them(copied, asked, monkeypatch) -> None:
    monkeypatch.setattr("framestep.export.tensorrt.WARM_STEPS", 1)
    monkeypatch.setattr("framestep.export.tensorrt.TIMED_STEPS", 2)
    with stand_in(copied, flavour="tensorrt") as machine:
        build(Bundle.open(copied), replace(OPTIONS, attention="auto"), NoProgress())
        assert machine.names().count("cuGraphLaunch") == 2 * 2 * (1 + 2)  # rounds, engines, steps
        loads = [arguments[0] for name, arguments in machine.calls if name == "Runtime.deserialize_cuda_engine"]
        runs = loads[2:6]  # the first two were looked at after they were built
        assert runs[0] == runs[2] != runs[1] == runs[3]
        assert machine.memory == {} and machine.contexts == 0


@quiet_cache
@pytest.mark.parametrize("kind", [EngineError, TypeError])
def test_auto_keeps_its_own_attention_where_ours_cannot_be_built(copied, asked, monkeypatch, kind) -> None:
    def refuse(*given) -> None:
        raise kind("no compiler")

    monkeypatch.setattr("framestep.export.tensorrt_plugin.insert_plugins", refuse)
    with stand_in(copied, flavour="tensorrt"):
        bundle, report = build(Bundle.open(copied), replace(OPTIONS, attention="auto"), NoProgress())
    assert report.notes == ("backbone: attention native, the other could not be built: no compiler",)
    assert {entry.attention for entry in bundle.manifest.engines.values()} == {"native"}


def test_the_marked_graph_has_no_update_left(golden_bundle) -> None:
    bundle = Bundle.open(golden_bundle)
    graph = bundle.manifest.graphs["backbone"]
    model, sites = mark_sites(bundle, graph)
    assert [site.rings for site in sites] == [
        tuple((f"layer{layer}.{name}.past", f"layer{layer}.{name}.present") for name in ("key", "value"))
        for layer in range(3)
    ]
    assert not any(node.op_type == "TensorScatter" for node in model.graph.node)
    assert sum(node.op_type == "Attention" for node in model.graph.node) == 4
    linear = [replace(state, kind="linear") for state in bundle.manifest.states]
    other = replace(bundle, manifest=replace(bundle.manifest, states=tuple(linear)))
    with pytest.raises(EngineError, match="has no attention over rings"):
        mark_sites(other, graph)
