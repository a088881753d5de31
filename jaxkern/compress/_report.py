"""The report of a compression."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    r"""How the MLP of one layer was compressed, and what that changed.

    Attributes:
        layer: The index of the layer.
        mlp: The name of the class of the new MLP.
        ranks: The rank of each low-rank weight.
        weight_errors: $\|W - \hat W\|_F / \|W\|_F$ of each weight, where $\hat W$ is
            the product of its new factors.
        output_error: $\|Y - \hat Y\|_F / \|Y\|_F$ of the outputs of the MLP on the
            calibration tokens, for the inputs that the given model has there; None
            without calibration tokens.
        parameters_before: The number of parameters of the old MLP.
        parameters: The number of parameters of the new one. Of 2:4-sparse weights half
            the entries count.
        flops_before: The FLOPs of the matmuls of the old MLP for one token.
        flops: Those of the new one, where 2:4 halves those of a matmul.

    Examples:
        ```python
        from jaxkern.compress import LayerReport

        errors = {"up": 0.5, "down": 0.25}
        line = LayerReport(0, "LowRankReLU2", {}, errors, None, 64, 32, 128, 64)
        print(line.output_error, line.parameters / line.parameters_before)
        ```
        ```text
        None 0.5
        ```
    """

    layer: int
    mlp: str
    ranks: dict[str, int]
    weight_errors: dict[str, float]
    output_error: float | None
    parameters_before: int
    parameters: int
    flops_before: int
    flops: int


@dataclass(frozen=True)
class Report:
    """The result of `compress`; `print` shows it as a table, a line a layer.

    Attributes:
        layers: A report of each compressed layer.
        parameters_before: The number of parameters of the model before.
        parameters: The number after.

    Examples:
        ```python
        from jaxkern.compress import LayerReport, Report

        errors = {"up": 0.5, "down": 0.25}
        line = LayerReport(0, "LowRankReLU2", {}, errors, None, 64, 32, 128, 64)
        print(Report((line,), 80, 48))
        ```
        ```text
        layer  MLP           ranks  error of weights  of outputs  parameters  FLOPs
            0  LowRankReLU2      -         0.50 0.25           -          32     64
        48 of 80 parameters (60.0 %)
        ```
    """

    layers: tuple[LayerReport, ...]
    parameters_before: int
    parameters: int

    def __str__(self) -> str:
        head = "layer", "MLP", "ranks", "error of weights", "of outputs"
        rows = [(*head, "parameters", "FLOPs"), *map(_cells, self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            cells = [
                cell.ljust(width) if i == 1 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells))
        share = 100 * self.parameters / self.parameters_before
        size = f"{self.parameters} of {self.parameters_before} parameters"
        return "\n".join([*lines, f"{size} ({share:.1f} %)"])


def _cells(line: LayerReport) -> tuple[str, ...]:
    error = line.output_error
    return (
        str(line.layer),
        line.mlp,
        " ".join(map(str, line.ranks.values())) or "-",
        " ".join(f"{error:.2f}" for error in line.weight_errors.values()),
        "-" if error is None else f"{error:.4f}",
        str(line.parameters),
        str(line.flops),
    )
