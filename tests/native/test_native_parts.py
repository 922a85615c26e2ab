"""The native library's inner parts against Python's own implementations of the same things."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_parts import MAX_DEPTH, Parts, Refused

from framestep.runtime import labels, onnx_files, state_file
from framestep.runtime.errors import BundleError, StateError
from framestep.runtime.manifest import RESIZES, FrameSpec
from framestep.runtime.preprocess import Preprocess

BUNDLE, FRAME, STATE, OUTPUT = 4, 6, 7, 8  # fs_status
FORMATS = ("rgb", "bgr", "grey")


class View(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("dtype", ctypes.c_char_p),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("rank", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_size_t),
    ]


hypothesis_settings = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


# JSON


integers = st.integers(-(2**63), 2**63 - 1)
scalars = st.none() | st.booleans() | integers | st.floats(allow_nan=False, allow_infinity=False) | st.text()
values = st.recursive(scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=30)


def sorted_text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def strict_loads(data: bytes) -> Any:
    """Python's json with what RFC 8259 and the native reader's limits refuse; ValueError."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({name for name, _ in pairs}) != len(pairs):
            raise ValueError("a name stands twice")
        return dict(pairs)

    def check(value: Any, depth: int) -> None:
        if isinstance(value, list | dict) and depth == MAX_DEPTH:
            raise ValueError("depth")
        if isinstance(value, str):
            value.encode()  # half of a surrogate pair
        elif isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise ValueError("not 64 bits")
        elif isinstance(value, float) and not np.isfinite(value):
            raise ValueError("not finite")
        elif isinstance(value, dict):
            for name, item in value.items():
                check(name, depth + 1)
                check(item, depth + 1)
        elif isinstance(value, list):
            for item in value:
                check(item, depth + 1)

    value = json.loads(data.decode("utf-8"), object_pairs_hook=members, parse_constant=refuse)
    check(value, 0)
    return value


def assert_reads_as_python_does(parts: Parts, data: bytes) -> None:
    try:
        expected = sorted_text(strict_loads(data))
    except (ValueError, RecursionError):
        with pytest.raises(Refused) as refused:
            parts.json(data)
        assert refused.value.status == BUNDLE
        return
    assert parts.json(data) == expected


@given(value=values, ascii_only=st.booleans(), indent=st.none() | st.integers(0, 3))
@hypothesis_settings
def test_json_is_read_and_dumped_as_python_does(parts, value, ascii_only, indent):
    data = json.dumps(value, ensure_ascii=ascii_only, indent=indent).encode("utf-8")
    assert parts.json(data) == sorted_text(value)


@given(value=values, ascii_only=st.booleans(), edits=st.data())
@hypothesis_settings
def test_damaged_json_is_read_as_python_does_or_refused_as_python_does(parts, value, ascii_only, edits):
    data = bytearray(json.dumps(value, ensure_ascii=ascii_only).encode("utf-8"))
    for _ in range(edits.draw(st.integers(1, 3))):
        at = edits.draw(st.integers(0, len(data)))
        wherewith = edits.draw(st.binary(max_size=2) | st.sampled_from([b'"', b"\\u", b"e9", b",", b"]", b"-0", b"."]))
        data[at : at + edits.draw(st.integers(0, 2))] = wherewith
    assert_reads_as_python_does(parts, bytes(data))


@given(data=st.text(alphabet='[]{}",:0123456789.eE+-tfnulrasd\\ud8c \n', max_size=24).map(str.encode))
@hypothesis_settings
def test_nearly_json_is_read_as_python_does_or_refused_as_python_does(parts, data):
    assert_reads_as_python_does(parts, data)


@pytest.mark.parametrize(
    "text",
    [
        *("9223372036854775807", "9223372036854775808", "-9223372036854775808", "-9223372036854775809", "-0"),
        *("1e308", "1e309", "-1e309", "1.7976931348623159e308", "1e-400", "-1e-400", "0e99999999999999999999"),
        *("1e99999999999999999999", "1e-99999999999999999999", "5e-324", "2e-324", "1" + "0" * 400 + ".0"),
        *("0." + "0" * 400 + "1e399", "0." + "0" * 400 + "1", "1e16", "1e15", "123456789012345680.0", "1e-4", "1e-5"),
        *("9007199254740993.0", "0.1", "100.0", "-0.0", "1e22", "1e23", "2.2250738585072011e-308", "1.5e300"),
        *("\ufeff1", "NaN", "Infinity", "01", "1.", ".5", "+1", "1e", "[1,]", '{"a":1,}', "'a'", "", " ", "\u00a01"),
        *('"\\ud83d\\ude00"', '"\\ud83d"', '"\\ude00"', '"\\ud83d\\u0041"', '"\\ud83dx"', '"\\u00e9"', '"\\x"', '"\t"'),
        *(
            '{"a":1,"a":2}',
            '{"a":1,"\\u0061":2}',
            '{"\U00010000":1,"\uffff":2,"a":3,"B":4}',
            '"\\u0000\\u001f\x7f\u2028"',
        ),
        *("[" * 64 + "]" * 64, "[" * 65 + "]" * 65, '{"a":' * 64 + "1" + "}" * 64, '{"a":' * 65 + "1" + "}" * 65),
    ],
)
def test_edges_of_json_are_as_in_python(parts, text):
    assert_reads_as_python_does(parts, text.encode())


@pytest.mark.parametrize(
    "data",
    [
        *(
            b"\xff",
            b"\x80",
            b"\xe2\x82",
            b"\xc3",
            b"\xf0\x9f\x98",
            b"\xe2\x28\xa1",
            b"\xf0\x28\x8c\xbc",
            b"\xf8\x88\x80\x80\x80",
        ),
        *(b"\xc0\x80", b"\xc1\xbf", b"\xe0\x9f\xbf", b"\xf0\x8f\xbf\xbf"),  # overlong
        *(b"\xed\xa0\x80", b"\xed\xbf\xbf", b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80"),  # surrogates, beyond the last
        *(
            b"\xc2\x80",
            b"\xe0\xa0\x80",
            b"\xed\x9f\xbf",
            b"\xee\x80\x80",
            b"\xf0\x90\x80\x80",
            b"\xf4\x8f\xbf\xbf",
        ),  # good
    ],
)
def test_text_is_utf8_where_it_is_for_python(parts, data):
    assert_reads_as_python_does(parts, b'"' + data + b'"')
    assert_reads_as_python_does(parts, b'"' + data)


@given(value=st.floats(allow_nan=False, allow_infinity=False))
@settings(hypothesis_settings, max_examples=500)
def test_a_float_is_written_as_python_writes_it(parts, value):
    assert parts.json(repr(value).encode()) == repr(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": tru}', "byte 6: expected true, found 't'"),
        ('{"a" 1}', "byte 5: expected ':', found '1'"),
        ("[1 2]", "byte 3: expected ',' or ']', found '2'"),
        ('{"a": 1', "byte 7: expected ',' or '}', found the end"),
        ('"\n"', "byte 1: expected an escape for a control character, found byte 0x0a"),
        ("1 x", "byte 2: expected the end, found 'x'"),
    ],
)
def test_a_refusal_says_where_what_was_expected_and_what_was_found(parts, text, message):
    with pytest.raises(Refused) as refused:
        parts.json(text.encode())
    assert refused.value.message == message


# SHA-256


@given(data=st.binary(max_size=300))
@hypothesis_settings
def test_a_hash_is_sha256(parts, data):
    assert parts("sha256_bytes", data, ctypes.c_size_t(len(data))).decode() == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("size", [0, 1, 55, 56, 63, 64, 65, 119, 120, (1 << 18) - 1, 1 << 18, (1 << 19) + 77])
def test_the_hash_of_a_file_is_that_of_its_content(parts, tmp_path, size):
    data = np.random.default_rng(size).bytes(size)
    path = tmp_path / "file"
    path.write_bytes(data)
    assert parts("sha256_file", bytes(path)).decode() == hashlib.sha256(data).hexdigest()


def test_a_file_that_cannot_be_read_is_named(parts, tmp_path):
    for path, why in ((tmp_path / "missing", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(Refused) as refused:
            parts("sha256_file", bytes(path))
        assert (refused.value.status, refused.value.message) == (BUNDLE, f"{path}: cannot be read: {why}")


# Preprocessing


class NativePreprocess:
    def __init__(self, parts: Parts, spec: FrameSpec, simd: int) -> None:
        self.parts, self.spec = parts, spec
        self.handle = ctypes.c_void_p()
        parts("preprocess_open", spec.height, spec.width, RESIZES.index(spec.resize), simd, ctypes.byref(self.handle))

    def __del__(self) -> None:
        self.parts.library.parts_preprocess_close(self.handle)

    def __call__(self, frame: np.ndarray, format: str, out: np.ndarray, **changes: int | None) -> None:
        height, width = frame.shape[:2]
        given = {"data": frame.ctypes.data, "width": width, "height": height, "stride": frame.strides[0], **changes}
        data, width, height, stride = given.values()
        self.parts(
            *("preprocess_fit", self.handle, ctypes.c_void_p(data), width, height, ctypes.c_int64(stride)),
            *(FORMATS.index(format), ctypes.c_void_p(out.ctypes.data)),
        )


def a_frame(height: int, width: int, format: str, padding: int = 0) -> np.ndarray:
    """Noise, with rows that have `padding` bytes between them."""
    channels = 1 if format == "grey" else 3
    rows = np.random.default_rng(height * width).integers(0, 256, (height, width * channels + padding), np.uint8)
    frame = rows[:, : width * channels]
    return (
        frame
        if format == "grey"
        else frame.reshape(height, width, 3)
        if not padding
        else np.lib.stride_tricks.as_strided(frame, (height, width, 3), (rows.strides[0], 3, 1))
    )


def as_rgb(frame: np.ndarray, format: str) -> np.ndarray:
    if format == "grey":
        return np.repeat(frame[..., None], 3, axis=2)
    return frame[..., ::-1] if format == "bgr" else frame


def assert_fits_as_python_does(
    parts: Parts, frame: np.ndarray, format: str, spec: FrameSpec, share: float = 0.01
) -> None:
    """`share`: of the numbers that may be rounded another way, by one."""
    expected = np.zeros((spec.height, spec.width, 3), np.uint8)
    Preprocess(spec)(as_rgb(frame, format), expected)
    for simd in range(parts.library.parts_fastest_simd() + 1):
        guarded = np.full(expected.size + 128, 77, np.uint8)
        out = guarded[64:-64].reshape(expected.shape)
        NativePreprocess(parts, spec, simd)(frame, format, out)
        difference = np.abs(out.astype(int) - expected)
        assert difference.max() <= 1, simd
        assert difference.sum() <= max(3, share * difference.size), simd
        assert (guarded[:64] == 77).all()
        assert (guarded[-64:] == 77).all()


@given(
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
    model=st.tuples(st.integers(1, 80), st.integers(1, 80)),
    resize=st.sampled_from(RESIZES),
    format=st.sampled_from(FORMATS),
    padding=st.integers(0, 40),
)
@hypothesis_settings
def test_frames_are_fitted_as_in_python(parts, size, model, resize, format, padding):
    # of sizes like 16 to 24 many a number lies in the middle between two
    assert_fits_as_python_does(parts, a_frame(*size, format, padding), format, FrameSpec(*model, resize), share=0.1)


@pytest.mark.parametrize("resize", RESIZES)
@pytest.mark.parametrize(
    "size",
    [
        (720, 1280),
        (1280, 720),
        (1080, 1920),
        (224, 224),
        (224, 300),
        (223, 224),
        (1, 1),
        (1, 16384),
        (16384, 1),
        (3, 9000),
    ],
)
def test_frames_of_every_size_are_fitted_as_in_python(parts, size, resize):
    for format in FORMATS:
        assert_fits_as_python_does(parts, a_frame(*size, format), format, FrameSpec(224, 224, resize))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stride": 899}, "frame: expected a stride of at least 900 bytes, found 899"),
        ({"stride": -900}, "frame: expected a stride of at least 900 bytes, found -900"),
        ({"height": 0}, "frame: expected height and width from 1 to 16384, found 0 x 300"),
        ({"width": -1}, "frame: expected height and width from 1 to 16384, found 200 x -1"),
        ({"width": 16385, "stride": 1 << 20}, "frame: expected height and width from 1 to 16384, found 200 x 16385"),
        ({"data": None}, "frame: expected pixels, found a null pointer"),
    ],
)
def test_an_impossible_frame_is_refused_and_nothing_is_written(parts, changes, message):
    frame, out = a_frame(200, 300, "rgb"), np.full((64, 64, 3), 7, np.uint8)
    with pytest.raises(Refused) as refused:
        NativePreprocess(parts, FrameSpec(64, 64), 0)(frame, "rgb", out, **changes)
    assert (refused.value.status, refused.value.message) == (FRAME, message)
    assert (out == 7).all()


def test_frames_of_the_last_four_sizes_are_fitted_without_an_allocation(parts):
    preprocess = NativePreprocess(parts, FrameSpec(64, 64), parts.library.parts_fastest_simd())
    frames = [a_frame(height, 90, "rgb") for height in (70, 80, 90, 100, 110)]
    out = np.zeros((64, 64, 3), np.uint8)

    def allocations(frame: np.ndarray) -> int:
        before = parts.library.parts_allocations()
        preprocess(frame, "rgb", out)
        return parts.library.parts_allocations() - before

    assert all(allocations(frame) > 0 for frame in frames[:4])
    assert all(allocations(frame) == 0 for frame in frames[:4] * 3)
    assert allocations(frames[4]) > 0  # in the place of the first
    assert all(allocations(frame) == 0 for frame in frames[1:])
    assert allocations(frames[0]) > 0


# Saved states


KEY = "0123456789abcdef" * 4
DTYPES = st.sampled_from(["float32", "float16", "int8"])
tensor_kinds = st.tuples(
    st.text(min_size=1, max_size=8).filter(lambda s: "\0" not in s and s != "__metadata__"), DTYPES
)
shapes = st.lists(st.integers(1, 5), max_size=3).map(tuple)
tensor_sets = st.lists(st.tuples(tensor_kinds, shapes), max_size=4, unique_by=lambda item: item[0][0]).map(
    lambda items: {name: random_tensor(shape, dtype) for (name, dtype), shape in items}
)


def random_tensor(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    return np.asarray(np.random.default_rng(7).standard_normal(shape) * 50).astype(dtype)


def views(tensors: dict[str, np.ndarray]) -> Any:
    return (View * len(tensors))(
        *(
            View(
                *(
                    name.encode(),
                    tensor.dtype.name.encode(),
                    (ctypes.c_int64 * tensor.ndim)(*tensor.shape),
                    tensor.ndim,
                ),
                *(tensor.ctypes.data, tensor.nbytes),
            )
            for name, tensor in tensors.items()
        )
    )


def write(parts: Parts, path: Path, key: str, position: int, tensors: dict[str, np.ndarray]) -> None:
    parts(
        "write_state",
        bytes(path),
        key.encode(),
        ctypes.c_int64(position),
        views(tensors),
        ctypes.c_size_t(len(tensors)),
    )


def read(parts: Parts, path: Path, key: str, into: dict[str, np.ndarray]) -> int:
    return int(parts("read_state", bytes(path), key.encode(), views(into), ctypes.c_size_t(len(into))))


def like(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.full(tensor.shape, 77, tensor.dtype) for name, tensor in tensors.items()}


def equal(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def expected_by_python(tensors: dict[str, np.ndarray]) -> dict[str, tuple[tuple[int, ...], str]]:
    return {name: (tensor.shape, tensor.dtype.name) for name, tensor in tensors.items()}


@given(tensors=tensor_sets, position=st.integers(0, 2**62))
@settings(hypothesis_settings, max_examples=60)
def test_states_are_interchangeable_with_python(parts, tmp_path, tensors, position):
    path = tmp_path / "state"
    write(parts, path, KEY, position, tensors)
    found_position, found = state_file.read_state(path, KEY, expected_by_python(tensors))
    assert found_position == position
    assert equal(found, tensors)

    state_file.write_state(path, KEY, position, tensors)
    into = like(tensors)
    assert read(parts, path, KEY, into) == position
    assert equal(into, tensors)


STATE_TENSORS = {"keys": random_tensor((2, 3), "float32"), "values": random_tensor((5,), "float16")}


@given(edits=st.data())
@hypothesis_settings
def test_a_damaged_state_is_read_as_in_python_or_refused_with_nothing_changed(parts, tmp_path, edits):
    path = tmp_path / "state"
    state_file.write_state(path, KEY, 5, STATE_TENSORS)
    data = bytearray(path.read_bytes())
    for _ in range(edits.draw(st.integers(1, 2))):
        at = edits.draw(st.integers(0, len(data)))
        data[at : at + edits.draw(st.integers(0, 4))] = edits.draw(st.binary(max_size=4))
    path.write_bytes(data)
    into = like(STATE_TENSORS)
    try:
        position = read(parts, path, KEY, into)
    except Refused as refused:
        assert refused.status == STATE
        assert refused.message.startswith(str(path))
        assert equal(into, like(STATE_TENSORS))
    else:
        found_position, found = state_file.read_state(path, KEY, expected_by_python(STATE_TENSORS))
        assert position == found_position
        assert equal(into, found)


def test_every_shorter_or_longer_state_is_refused_with_nothing_changed(parts, tmp_path):
    path = tmp_path / "state"
    write(parts, path, KEY, 5, STATE_TENSORS)
    data = path.read_bytes()
    for changed in (*(data[:length] for length in range(len(data))), data + b"\0"):
        path.write_bytes(changed)
        into = like(STATE_TENSORS)
        with pytest.raises(Refused) as refused:
            read(parts, path, KEY, into)
        assert refused.value.status == STATE
        assert equal(into, like(STATE_TENSORS))


def rewritten(path: Path, change: Any) -> None:
    """Change the header of a safetensors file; `change` gets the parsed one."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header["__metadata__"].update(state_key="f" * 64), "was saved by another model"),
        (lambda header: header["__metadata__"].update(position="-1"), "damaged, its position is -1"),
        (
            lambda header: header["__metadata__"].update(position=str(2**62 + 1)),
            "damaged, its position is 4611686018427387905",
        ),
        (lambda header: header["__metadata__"].update(position=str(2**63)), "damaged, or not a framestep state file"),
        (lambda header: header["__metadata__"].update(position=5), "damaged, or not a framestep state file"),
        (lambda header: header["__metadata__"].pop("format"), "damaged, or not a framestep state file"),
        (lambda header: header.pop("__metadata__"), "damaged, or not a framestep state file"),
        (lambda header: header["keys"].update(shape=[3, 2]), "damaged at 'keys'"),
        (lambda header: header["keys"].update(shape=[-2, -3]), "damaged, or not a framestep state file"),
        (lambda header: header["keys"].update(shape=[2**40, 2**40]), "damaged, or not a framestep state file"),
        (lambda header: header["values"].update(data_offsets=[20, 30]), "damaged, or not a framestep state file"),
        (lambda header: header["values"].update(dtype="F64"), "damaged, or not a framestep state file"),
        (lambda header: header.update(other=header.pop("values")), "damaged at 'values'"),
        (
            lambda header: header.update(more={"dtype": "I8", "shape": [0], "data_offsets": [34, 34]}),
            "tensors that the model",
        ),
    ],
)
def test_a_state_of_another_model_is_refused(parts, tmp_path, change, message):
    path = tmp_path / "state"
    state_file.write_state(path, KEY, 5, STATE_TENSORS)
    rewritten(path, change)
    into = like(STATE_TENSORS)
    with pytest.raises(Refused) as refused:
        read(parts, path, KEY, into)
    assert refused.value.status == STATE
    assert f"{path}: " in refused.value.message
    assert message in refused.value.message
    assert equal(into, like(STATE_TENSORS))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_state_with_a_number_that_is_not_finite_is_refused(parts, tmp_path, dtype, number):
    tensors = {"keys": random_tensor((7,), dtype), "values": random_tensor((7,), dtype)}
    tensors["values"][6] = number
    path = tmp_path / "state"
    write(parts, path, KEY, 5, tensors)
    into = like(tensors)
    with pytest.raises(Refused, match="damaged at 'values': it has numbers that are not finite"):
        read(parts, path, KEY, into)
    assert equal(into, like(tensors))


def test_python_and_native_refuse_another_models_state_with_the_same_words(parts, tmp_path):
    path = tmp_path / "state"
    write(parts, path, KEY, 5, STATE_TENSORS)
    with pytest.raises(StateError) as by_python:
        state_file.read_state(path, "f" * 64, expected_by_python(STATE_TENSORS))
    with pytest.raises(Refused) as refused:
        read(parts, path, "f" * 64, like(STATE_TENSORS))
    assert refused.value.message == str(by_python.value)


def test_a_state_replaces_the_file_before_with_the_usual_permissions(parts, tmp_path):
    path = tmp_path / "state"
    path.write_bytes(b"before")
    before = os.umask(0o027)
    try:
        write(parts, path, KEY, 5, STATE_TENSORS)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640
    assert [file.name for file in tmp_path.iterdir()] == ["state"]


def test_a_state_that_cannot_be_written_leaves_nothing(parts, tmp_path):
    (tmp_path / "folder").mkdir()
    for path, why in (
        (tmp_path / "folder", "Is a directory"),
        (tmp_path / "none" / "state", "No such file or directory"),
    ):
        with pytest.raises(Refused) as refused:
            write(parts, path, KEY, 5, STATE_TENSORS)
        assert (refused.value.status, refused.value.message) == (OUTPUT, f"{path}: cannot be written: {why}")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


# Label embeddings


def safetensors(parts: Parts, path: Path) -> dict[str, np.ndarray]:
    return {
        name: np.frombuffer(bytes.fromhex(data), dtype).reshape(shape)
        for name, dtype, shape, data in json.loads(parts("safetensors", bytes(path)))
    }


def test_label_embeddings_are_read_as_in_python(parts, tmp_path):
    path = tmp_path / "labels"
    arrays = [random_tensor((3, 4), "float32"), random_tensor((3, 6), "float32")]
    path.write_bytes(labels.label_bytes(*arrays))
    assert equal(safetensors(parts, path), dict(zip(labels.NAMES, arrays, strict=True)))


@given(edits=st.data())
@hypothesis_settings
def test_damaged_label_embeddings_are_read_as_in_python_or_refused(parts, tmp_path, edits):
    data = bytearray(labels.label_bytes(random_tensor((2, 2), "float32"), random_tensor((2, 3), "float32")))
    for _ in range(edits.draw(st.integers(1, 2))):
        at = edits.draw(st.integers(0, len(data)))
        data[at : at + edits.draw(st.integers(0, 4))] = edits.draw(st.binary(max_size=4))
    path = tmp_path / "labels"
    path.write_bytes(data)
    try:
        found = safetensors(parts, path)
    except Refused as refused:
        assert refused.status == BUNDLE
        assert refused.message == f"{path}: damaged; label the bundle again with 'framestep label'"
        return
    if set(labels.NAMES) <= found.keys():  # the names may have been what was damaged
        try:
            expected = labels.read_label_embeddings(path, 2)
        except BundleError:
            return  # another number of rows, or of another kind: for the caller to say
        for name, array in zip(labels.NAMES, expected, strict=True):
            assert np.array_equal(found[name], array, equal_nan=True)


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["text_embeddings"].update(shape=[2, 3]),
        lambda header: header["text_embeddings"].update(shape=[-2, -2]),
        lambda header: header["text_embeddings"].update(shape=[2**62, 2**62]),
        lambda header: header["text_embeddings"].update(shape=[2.0, 2]),
        lambda header: header["text_embeddings"].update(data_offsets=[0, 40]),
        lambda header: header["text_embeddings"].update(data_offsets=[16, 0]),
        lambda header: header["text_embeddings"].update(data_offsets=[-16, 0]),
        lambda header: header["text_embeddings"].update(data_offsets=[0, 16, 16]),
        lambda header: header["text_embeddings"].update(more=1),
        lambda header: header["text_embeddings"].pop("dtype"),
        lambda header: header["patch_text_embeddings"].update(data_offsets=[20, 44]),
        lambda header: header["patch_text_embeddings"].update(data_offsets=[0, 24]),
        lambda header: header.pop("patch_text_embeddings"),
    ],
)
def test_label_embeddings_that_do_not_fill_their_file_are_refused(parts, tmp_path, change):
    path = tmp_path / "labels"
    path.write_bytes(labels.label_bytes(random_tensor((2, 2), "float32"), random_tensor((2, 3), "float32")))
    rewritten(path, change)
    with pytest.raises(Refused, match="damaged; label the bundle again with 'framestep label'"):
        safetensors(parts, path)


# ONNX


def external(location: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name=location, data_type=onnx.TensorProto.FLOAT, dims=[1])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0")):
        tensor.external_data.add(key=key, value=value)
    return tensor


def a_sparse(name: str) -> onnx.SparseTensorProto:
    return onnx.SparseTensorProto(values=external(f"{name}.values"), indices=external(f"{name}.indices"), dims=[1])


def a_graph(depth: int = 0) -> onnx.GraphProto:
    """Tensors wherever ONNX can hold one, and at each depth a graph in a node."""
    sparse = a_sparse(f"sparse{depth}")
    node = onnx.helper.make_node("If", ["c"], ["y"])
    attributes = {
        "one": onnx.helper.make_attribute("one", external(f"one{depth}")),
        "several": onnx.helper.make_attribute("several", [external(f"a{depth}"), external(f"b{depth}")]),
        "sparse": onnx.helper.make_attribute("sparse", sparse),
        "sparses": onnx.helper.make_attribute("sparses", [a_sparse(f"first{depth}"), a_sparse(f"second{depth}")]),
        "graphs": onnx.helper.make_attribute(
            "graphs", [onnx.helper.make_graph([], "g", [], [], [external(f"in{depth}")])]
        ),
        "text": onnx.helper.make_attribute("text", "location"),
    }
    if depth < 3:
        attributes["graph"] = onnx.helper.make_attribute("graph", a_graph(depth + 1))
    node.attribute.extend(attributes.values())
    inline = onnx.numpy_helper.from_array(np.arange(50, dtype=np.float32), "inline")
    graph = onnx.helper.make_graph([node], "g", [], [], [inline, external(f"weight{depth}"), external("weights/ü.bin")])
    graph.sparse_initializer.append(sparse)
    return graph


def a_model() -> bytes:
    model = onnx.helper.make_model(a_graph())
    function = onnx.helper.make_function("d", "f", [], [], [], [onnx.helper.make_opsetid("", 24)])
    function.node.append(onnx.helper.make_node("Constant", [], ["x"], value=external("in_function")))
    function.attribute_proto.append(onnx.helper.make_attribute("default", external("in_default")))
    model.functions.append(function)
    model.training_info.add().initialization.CopyFrom(a_graph(3))
    return model.SerializeToString()


def test_external_files_are_found_as_in_python(parts, tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(a_model())
    expected = sorted(onnx_files.external_files(path))
    assert parts.external_files(path) == expected
    assert {"weights/ü.bin", "in_function", "in_default", "sparse3.values", "one0", "b2", "in1"} <= set(expected)


@given(edits=st.data())
@hypothesis_settings
def test_of_a_damaged_graph_the_same_files_are_found_or_it_is_refused(parts, tmp_path, edits):
    data = bytearray(a_model())
    for _ in range(edits.draw(st.integers(1, 3))):
        at = edits.draw(st.integers(0, len(data)))
        data[at : at + edits.draw(st.integers(0, 3))] = edits.draw(st.binary(max_size=3))
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    try:
        found = parts.external_files(path)
    except Refused as refused:
        assert (refused.status, refused.message) == (BUNDLE, f"{path}: damaged, or not an ONNX graph")
        return
    assert found == sorted(onnx_files.external_files(path))


@pytest.mark.parametrize(
    "data",
    [
        b"\x3a\x05ab",  # a field beyond the end
        b"\x0b",  # a group, which ONNX never has
        b"\x80" * 11,  # a number without an end
        b"\x09abc",  # a fixed number cut short
        bytes(itertools.chain.from_iterable(b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01" for _ in range(3))),
    ],
)
def test_what_is_not_a_graph_is_refused(parts, tmp_path, data):
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(Refused, match="damaged, or not an ONNX graph"):
        parts.external_files(path)


def test_graphs_in_graphs_without_end_are_refused(parts, tmp_path):
    message = b""
    for _ in range(200):  # attribute, node, graph
        for field in (b"\x32", b"\x2a", b"\x0a"):
            length = len(message)
            message = field + bytes([length & 0x7F | 0x80, length >> 7 & 0x7F | 0x80, length >> 14]) + message
    path = tmp_path / "model.onnx"
    path.write_bytes(
        b"\x3a" + bytes([len(message) & 0x7F | 0x80, len(message) >> 7 & 0x7F | 0x80, len(message) >> 14]) + message
    )
    with pytest.raises(Refused, match="damaged, or not an ONNX graph"):
        parts.external_files(path)
