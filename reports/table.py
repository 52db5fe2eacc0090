"""The numbers of a report as text for a console."""

from collections.abc import Mapping

from metrics.table import entries, interval_of, range_of, remarks
from reports import paired
from reports.settings import of_report, sampler_words

PSNR = {
    "restore_psnr": "PSNR of one restoration, dB",
    "restore_psnr_mean": "PSNR of the mean of an image's restorations",
    "restore_psnr_plain": "PSNR of a plain restoration",
}
RESTORED = PSNR | {
    "restore_spread": "spread, of [0, 1]",
    "restore_nfe": "evaluations",
}


def likelihood_of(report: Mapping) -> str | None:
    """The key of the likelihoods of a report, bpd or nats; None where it has none."""
    return next((key for key in ("bpd", "nats") if key in report), None)


def report_table(report: Mapping, split: str, title: str) -> str:
    """Text of the numbers of a report (arrays of report_{k}.npz), of which some are of `split`."""
    rows = metric_rows(report, split)
    if (unit := likelihood_of(report)) is not None:
        rows.append(("evaluations of a likelihood", f"{report[f'{unit}_nfe']:.0f}"))
        rows.append(("encoded and decoded, error", f"{report['encoding_error']:.1e}"))
    if "num_samples" in report:
        rows.append(("samples", str(report["num_samples"])))
        if report["nonfinite"]:
            rows.append(("  not finite", str(report["nonfinite"])))
        if "nfe" in report:
            rows.append(("  evaluations", f"{report['nfe']:.0f}"))
        if "settings" in report:
            rows.append(("  sampler", sampler_words(of_report(report))))
    if "restore_images" in report:
        rows.append(("images restored", str(report["restore_images"])))
        for key, label in RESTORED.items():
            if key in report:
                rows.append((f"  {label}", f"{float(report[key]):.4g}"))
    if "pairs_images" in report:
        rows.append(("pairs", f"{report['pairs_images']}, {report['pairs_draws']} draws of each"))
        rows += [(f"  {label}", text) for label, text in paired.rows(report, "{:.4g}".format)]
    if "pairs_nonfinite" in report:
        rows.append(("pairs whose draws are not finite", str(report["pairs_nonfinite"])))
    rows.append(("seconds", f"{report['seconds']:.1f}"))
    return "\n  ".join([format_table(rows, title), *remarks(report)])


def metric_rows(report: Mapping, split: str = "") -> list[tuple[str, str]]:
    """Labels and values of the metrics of a report, each with its interval and floor below it."""
    rows = []
    for key, metric, *_, label in entries(report):
        value = f"{float(report[key]):.6g}"
        label += f" ({split})" if metric.compute is None else ""
        if (error := report.get(f"{key}_error")) is not None:
            value += f" +- {float(error):.2g}"
        rows.append((label, value))
        if ends := interval_of(report, key):
            rows.append(("  95 % interval", "{:.6g} to {:.6g}".format(*ends)))
        if ends := range_of(report, key):
            rows.append((f"  of {report['repeats']} sets", "{:.6g} to {:.6g}".format(*ends)))
        if (of_data := report.get(f"{key}_data")) is not None:
            rows.append(("  of the data", f"{float(of_data):.6g}"))
    return rows


def format_table(rows: list[tuple[str, str]], title: str) -> str:
    """The `rows`, labels and values, aligned in two columns under `title`."""
    width = max(len(label) for label, _ in rows)
    return "\n".join([title, *(f"  {label:<{width}}  {value}" for label, value in rows)])
