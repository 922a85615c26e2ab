"""`gpu.md` from `gpu.json`."""

from __future__ import annotations

from typing import Any

TITLES = {
    "copy": "Device copy",
    "temporal_attention": "temporal_attention, float16, ring full",
    "temporal_attention_int8": "temporal_attention over an int8 ring",
    "decode_attention": "decode_attention, float16",
    "block_linear": "block_linear, float16 times weights of 4 and 8 bits in blocks",
    "widen_blocks": "A prompt's product: widening a matrix, and multiplying by it",
    "decoder": "A decoder of 0.5 billion weights through the engine, by weights, new tokens and those in the cache",
    "prime": "Priming a stream, float16",
    "step": "The step of the base model through the engine, one stream, host to host",
    "session": "The same through Session.step, float16",
    "streams": "Many streams in one step, float16, pooled brought to the host",
    "compiled": "The same through TensorRT and ONNX Runtime, host to host",
    "baselines": "PyTorch's own ways, one stream, host to host",
    "kernels": "Where a float16 step's time goes on the device",
    "tune": "Ways to cut temporal_attention: share of copy by streams x window, best rule first",
    "tune_parts": "Parts of a window: share of copy",
    "tune_products": "Ways to cut block_linear, one token: share of copy by inputs x outputs, best rule first",
    "tune_decoder": "Parts of a decoder's cache: microseconds",
}


def markdown(results: dict[str, Any]) -> str:
    sections = results["sections"]
    lines = [f"# {results['hardware'].get('name', 'no GPU')}", ""]
    lines += [", ".join(f"{key} {value}" for key, value in results["hardware"].items() if key != "name"), ""]
    if results["rehearsal"]:
        lines += ["A rehearsal with small sizes and interpreted kernels: no time here means anything.", ""]
    failures = [f"{section['name']}: {message}" for section in sections for message in section["failures"]]
    checks = [row for section in sections for row in section["rows"].get("checks", [])]
    if failures:
        lines += ["## WRONG", "", *(f"- {message}" for message in failures), ""]
    lines += [f"{len(checks)} comparisons with references, {len(failures)} failures.", ""]
    lines += _targets(results)
    for table, title in TITLES.items():
        rows = [row for section in sections for row in section["rows"].get(table, [])]
        if rows:
            lines += [f"## {title}", "", *_table(rows), ""]
    worst: dict[str, dict[str, Any]] = {}
    for row in checks:
        kind = " ".join(row["what"].replace(":", "").split()[:2])
        if kind not in worst or row["error"] > worst[kind]["error"]:
            worst[kind] = row
    if worst:
        lines += ["## Largest errors", "", *_table(list(worst.values())), ""]
    skipped = [f"{section['name']}: {message}" for section in sections for message in section["skipped"]]
    if skipped:
        lines += ["## Not measured", "", *(f"- {message}" for message in skipped), ""]
    facts = {key: value for section in sections for key, value in section["facts"].items()}
    if facts:
        lines += ["## Further facts", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    lines += ["Seconds: " + ", ".join(f"{section['name']} {section['seconds']}" for section in sections), ""]
    return "\n".join(lines)


def _targets(results: dict[str, Any]) -> list[str]:
    """What is asked of an H200, with what was found; not for rehearsals."""
    if results["rehearsal"]:
        return []
    rows: dict[str, list[dict[str, Any]]] = {}
    for section in results["sections"]:
        for name, measured in section["rows"].items():
            rows.setdefault(name, []).extend(measured)
    attention = rows.get("temporal_attention", [])
    large = [row for row in attention if row["window"] >= 64 and row["streams"] >= 4]
    step = {row["position"]: row for row in rows.get("step", []) if row["precision"] == "fp16"}
    baselines = rows.get("baselines", [])
    growing = [row for row in baselines if "growing" in row["name"] and row["position"] == 64]
    compiled = [row["p50_ms"] for row in baselines if "torch.compile" in row["name"]]
    found: list[tuple[str, str, bool]] = []
    if large:
        low = min(row["share_of_copy"] for row in large)
        found.append(("least share of copy, window >= 64, streams >= 4: 0.85", f"{low:.2f}", low >= 0.85))
    faster = [row["times_faster"] for row in attention if "times_faster" in row]
    if faster:
        low = min(faster)
        found.append(("least factor over the best of PyTorch: 1.3", f"{low:.2f}", low >= 1.3))
    if step:
        medians = [row["p50_ms"] for row in step.values()]
        spread = max(row["p99_ms"] / row["p50_ms"] for row in step.values())
        full = [row["p50_ms"] for position, row in step.items() if position >= 16]
        found.append(("step p50: 1.0 ms", f"{max(medians):.3f} ms", max(medians) <= 1.0))
        found.append(("step p99 over p50: 1.10", f"{spread:.2f}", spread <= 1.1))
        if full:
            found.append(
                ("flat from the full ring on: 1.02", f"{max(full) / min(full):.3f}", max(full) <= 1.02 * min(full))
            )
        for row in growing:
            factor = row["p50_ms"] / max(medians)
            found.append((f"over {row['name']} at 64: 10", f"{factor:.1f}", factor >= 10))
        if compiled:
            factor = min(compiled) / max(medians)
            found.append(("over torch.compile, reduce-overhead: 1", f"{factor:.2f}", factor > 1))
    many = [row for row in rows.get("streams", []) if row["streams"] == 64]
    if many:
        rate = many[0]["frames_per_second"]
        found.append(("frames a second over 64 streams: 5000", f"{rate:.0f}", rate >= 5000))
    table = [{"target": target, "found": value, "met": "yes" if met else "NO"} for target, value, met in found]
    return ["## Targets", "", *_table(table), ""] if table else []


def _table(rows: list[dict[str, Any]]) -> list[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(column)) for column in columns) + " |" for row in rows]
    return lines


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:.3f}" if abs(value) < 100 else f"{value:.0f}"
    return str(value).replace("|", "/")
