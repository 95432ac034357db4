"""Recordings of speech, as people have them."""

from fractions import Fraction

import av
import numpy as np
import pytest

from skyrun.errors import SkyrunError
from skyrun.media.loudness import loudness
from skyrun.media import speech as reader
from skyrun.tasks.skyreels_v3 import TASKS
from skyrun.tasks.windows import RATE


def read_speech(path, seconds=None):
    return reader.read_speech(path, RATE, TASKS["a2v"].seconds, seconds).samples


def tone(rate, seconds=1.5, channels=1, amplitude=0.2):
    time = np.arange(int(rate * seconds)) / rate
    wave = amplitude * np.sin(2 * np.pi * 440 * time) * (1 + 0.5 * np.sin(2 * np.pi * 3 * time))
    return np.stack([wave * (1.2 if channel else 0.8) for channel in range(channels)]).astype(np.float32)


def recording(path, samples, rate, codec, format="fltp"):
    layout = {1: "mono", 2: "stereo", 6: "5.1"}[len(samples)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        stream.codec_context.format = format
        resampler = av.AudioResampler(format=format, layout=layout, rate=rate, frame_size=1024)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(piece))
        container.mux(stream.encode())
    return path


KINDS = [
    ("a.wav", "pcm_s16le", "s16", 16000, 1),
    ("a.wav", "pcm_s16le", "s16", 48000, 2),
    ("a.wav", "pcm_f32le", "flt", 44100, 1),
    ("a.flac", "flac", "s16", 44100, 2),
    ("a.mp3", "libmp3lame", "fltp", 44100, 2),
    ("a.m4a", "aac", "fltp", 48000, 2),
    ("a.mkv", "aac", "fltp", 48000, 6),
    ("a.ogg", "libopus", "flt", 48000, 1),
]


@pytest.mark.parametrize(("name", "codec", "format", "rate", "channels"), KINDS)
def test_any_recording(tmp_path, name, codec, format, rate, channels):
    path = recording(tmp_path / name, tone(rate, channels=channels), rate, codec, format)
    speech = read_speech(path)
    assert len(speech) == pytest.approx(1.5 * RATE, abs=2500)  # codecs pad
    assert loudness(speech, RATE) == pytest.approx(-23, abs=1e-6)
    expected = tone(RATE)[0]
    got = speech[4000:16000]
    best = max(abs(np.corrcoef(got, expected[4000 + shift : 16000 + shift])[0, 1]) for shift in range(-1400, 1400))
    assert best > 0.99


def test_16_bits_at_the_right_rate_are_taken_as_they_are(goldens):
    golden = goldens("wav2vec2/speech_1.03s")
    path = goldens("e2e/talking_avatar/golden").folder / "speech.wav"
    speech = read_speech(path)
    assert len(speech) == 54400
    with av.open(str(path)) as container:
        samples = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)]) / 32768
    ratio = speech[samples != 0] / samples[samples != 0]
    assert ratio.std() < 1e-9 * abs(ratio.mean())
    assert golden.notes["samples"] == 16480


def test_silence(tmp_path):
    speech = read_speech(recording(tmp_path / "a.wav", np.zeros((1, 16000), np.float32), 16000, "pcm_s16le", "s16"))
    assert len(speech) == 16000 and not speech.any()


def test_only_the_beginning(tmp_path):
    path = recording(tmp_path / "a.wav", tone(16000, 3), 16000, "pcm_s16le", "s16")
    assert len(read_speech(path, 1.0)) == 16000
    assert len(read_speech(path, 9.0)) == 48000


@pytest.mark.parametrize(
    ("seconds", "message"),
    [(0.3, "has 0.3 s of audio, expected 0.4 to 200 s"), (204, "has 20[1-5].* s of audio, expected")],
)
def test_lengths(tmp_path, seconds, message):
    samples = np.zeros((1, int(8000 * seconds)), np.float32)
    path = recording(tmp_path / "a.wav", samples, 8000, "pcm_s16le", "s16")
    with pytest.raises(SkyrunError, match=message) as caught:
        read_speech(path)
    assert ("--seconds 200 takes the beginning" in caught.value.hint) == (seconds > 200)


def test_what_is_no_recording(tmp_path, goldens):
    (tmp_path / "a.wav").write_text("no sound")
    with pytest.raises(SkyrunError, match="not a readable recording"):
        read_speech(tmp_path / "a.wav")
    with pytest.raises(SkyrunError, match="has no audio in it"):
        read_speech(goldens("e2e/single_shot_extension/golden").folder / "input.mp4")
