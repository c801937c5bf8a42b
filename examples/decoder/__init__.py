"""A configurable decoder language model with mixture-of-experts layers, and byte-level text to train it on."""

from examples.decoder.lightning_module import DecoderModule
from examples.decoder.model import Decoder, DecoderConfig
from examples.decoder.sample import SampleContinuation
from examples.decoder.text import TextDataModule

__all__ = ["Decoder", "DecoderConfig", "DecoderModule", "SampleContinuation", "TextDataModule"]
