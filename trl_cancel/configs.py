"""The configurations: of the package, and with the settings of each paper."""

from .config import CancelGRPOConfig, of_paper


@of_paper("DFPO")
class DFPOConfig(CancelGRPOConfig): ...


@of_paper("GRPOFix")
class GRPOFixConfig(CancelGRPOConfig): ...


@of_paper("NTHR")
class NTHRConfig(CancelGRPOConfig): ...


@of_paper("DelTA")
class DelTAConfig(CancelGRPOConfig): ...


__all__ = ["CancelGRPOConfig", "DFPOConfig", "DelTAConfig", "GRPOFixConfig", "NTHRConfig"]
