"""GPUs: what their data sheets promise, and which share of it is reached.

Data sheets of NVIDIA, dense rates (half of what they print "with sparsity"), SXM models where there are several kinds:
"A100 Tensor Core GPU", "H100 Tensor Core GPU", "H200 Tensor Core GPU", "HGX B200" (an eighth of it); white papers
"Ampere GA102 GPU Architecture" (RTX 3090) and "Ada GPU Architecture" (RTX 4080, 4090), bf16 with sums in float32.
"""

from dataclasses import dataclass

from fastbeit.errors import ConfigError

# bytes/s one way; the data sheets print both ways together
PCIE_4, PCIE_5 = 32e9, 64e9
# bytes/s a card to other nodes. Assumptions: the adapters of NVIDIA's DGX, one a card (DGX A100: 200 Gb/s, DGX H100,
# H200 and B200: 400 Gb/s); for GeForce cards one adapter of 100 Gb/s for eight
NET_400, NET_200, NET_SHARED = 50e9, 25e9, 12.5e9 / 8


@dataclass(frozen=True)
class Shares:
    """What is reached of a data sheet's rates: by a large bf16 product, and by torch.clone."""

    products: float
    bandwidth: float
    known: bool = True  # False: another card's


OF_H100 = Shares(650 / 989, 3.0 / 3.35)
OF_A100 = Shares(235 / 312, 1.75 / 2.039)
AS_H100 = Shares(OF_H100.products, OF_H100.bandwidth, known=False)


@dataclass(frozen=True)
class Card:
    """Of a data sheet, but `network` and `shares`."""

    name: str
    memory_gib: int
    peak: float  # FLOP/s of bf16
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s one way, to the other cards of its node: NVLink, or PCIe
    to_host: float  # bytes/s one way, to the memory of its host
    network: float  # bytes/s, to other nodes
    shares: Shares = AS_H100

    @property
    def products(self) -> float:
        """FLOP/s that are reached."""
        return self.peak * self.shares.products

    @property
    def copy(self) -> float:
        """Bytes/s that are reached."""
        return self.bandwidth * self.shares.bandwidth


CARDS = {
    "rtx4080": Card("RTX 4080", 16, 97.5e12, 716.8e9, PCIE_4, PCIE_4, NET_SHARED),
    "rtx3090": Card("RTX 3090", 24, 71e12, 936e9, PCIE_4, PCIE_4, NET_SHARED),
    "rtx4090": Card("RTX 4090", 24, 165.2e12, 1008e9, PCIE_4, PCIE_4, NET_SHARED),
    "a100-40gb": Card("A100 40GB", 40, 312e12, 1555e9, 300e9, PCIE_4, NET_200, OF_A100),
    "a100-80gb": Card("A100 80GB", 80, 312e12, 2039e9, 300e9, PCIE_4, NET_200, OF_A100),
    "h100": Card("H100", 80, 989e12, 3350e9, 450e9, PCIE_5, NET_400, OF_H100),
    "h200": Card("H200", 141, 989e12, 4800e9, 450e9, PCIE_5, NET_400),
    "b200": Card("B200", 180, 2250e12, 8000e9, 900e9, PCIE_5, NET_400),
}


# of what the driver calls a card, H100 and H200 of the SXM kind alone: the others have lower clocks
PEAKS = {"H100": CARDS["h100"].peak, "H200": CARDS["h200"].peak, "A100": CARDS["a100-80gb"].peak}
NOT_SXM = "PCIe", "NVL", "GH200"


def peak_of(gpu: str) -> float | None:
    """Dense bfloat16 FLOP/s that an MFU is of, by the driver's name of a card; None: not known here."""
    if "H" in gpu and any(word in gpu for word in NOT_SXM):
        return None
    return next((peak for name, peak in PEAKS.items() if name in gpu), None)


def card_of(name: str) -> Card:
    """By its key in `CARDS`, however it is spelt: `A100 80GB`, `a100-80gb`.

    Raises:
        ConfigError: it is not in the table.
    """
    plain = {_plain(key): card for key, card in CARDS.items()}
    if _plain(name) not in plain:
        raise ConfigError(f"no GPU '{name}' is known; there are {', '.join(CARDS)}")
    return plain[_plain(name)]


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
