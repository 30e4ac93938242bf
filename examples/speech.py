"""Speech with known times: what espeak-ng says, and when it begins each word."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec

import numpy as np

INSTALLED = find_spec("espeakng_loader") is not None
SYNCHRONOUS, CHARACTERS, UTF8 = 2, 1, 1  # of speak_lib.h
END, WORD = 0, 1  # kinds of events


class _Event(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int),
        ("message", ctypes.c_uint),
        ("character", ctypes.c_int),  # from 1
        ("length", ctypes.c_int),
        ("milliseconds", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user", ctypes.c_void_p),
        ("name", ctypes.c_char * 8),
    )


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


def say(text: str, rate: int, words_per_minute: int = 140) -> tuple[np.ndarray, dict[int, float]]:
    """Samples at `rate` from -1 to 1, and where in text a word begins: when, in seconds.

    A word that is spoken in one breath with the one before has no time of its own.
    """
    import espeakng_loader

    espeak = ctypes.CDLL(espeakng_loader.get_library_path())
    data = espeakng_loader.get_data_path().encode()
    its_rate = espeak.espeak_Initialize(SYNCHRONOUS, 0, data, 0)
    pieces, starts = [], {}

    def receive(wave, count, events) -> int:
        if count:
            pieces.append(np.ctypeslib.as_array(wave, (count,)).astype(np.float32) / 2**15)
        at = 0
        while events[at].kind != END:
            if events[at].kind == WORD:
                starts[events[at].character - 1] = events[at].milliseconds / 1000
            at += 1
        return 0

    callback = _Callback(receive)
    espeak.espeak_SetSynthCallback(callback)
    espeak.espeak_SetVoiceByName(b"en-us")
    espeak.espeak_SetParameter(1, words_per_minute, 0)
    encoded = text.encode()
    espeak.espeak_Synth(encoded, len(encoded) + 1, 0, CHARACTERS, 0, UTF8, None, None)
    samples = np.concatenate(pieces)
    times = np.arange(int(len(samples) * rate / its_rate)) / rate
    return np.interp(times, np.arange(len(samples)) / its_rate, samples).astype(np.float32), starts
