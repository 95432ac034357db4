"""Recordings of speech, as people have them."""

import wave
from fractions import Fraction

import av
import numpy as np
import pytest
from media_files import joined_files, write_media

from skyrun.errors import SkyrunError
from skyrun.media import speech as reader
from skyrun.media.loudness import loudness
from skyrun.tasks import TASKS
from skyrun.tasks.windows import SPEECH_RATE


def read_speech(path, seconds=None):
    return reader.read_speech(path, SPEECH_RATE, TASKS["a2v"].seconds, seconds).samples


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
    assert len(speech) == pytest.approx(1.5 * SPEECH_RATE, abs=2500)  # codecs pad
    assert loudness(speech, SPEECH_RATE) == pytest.approx(-23, abs=1e-6)
    expected = tone(SPEECH_RATE)[0]
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


def wav(path, channels, rate=16000, width=2):
    """A WAV of these channels [n, samples] in [-1, 1]."""
    levels = np.clip(
        np.asarray(channels).T * (1 << (8 * width - 1)), -(1 << (8 * width - 1)), (1 << (8 * width - 1)) - 1
    )
    with wave.open(str(path), "wb") as file:
        file.setnchannels(len(channels))
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(levels.astype(f"<i{width}").tobytes())
    return path


def opus(path, count):
    """So many channels, each in a plane of its own when it is decoded."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            "libopus", rate=48000, layout=f"{count} channels", options={"mapping_family": "255"}
        )
        stream.codec_context.format = "s16"
        samples = (tone(48000)[0] * 32767).astype(np.int16)
        for place in range(0, len(samples) - 960, 960):
            piece = np.repeat(samples[place : place + 960], count)[None]
            frame = av.AudioFrame.from_ndarray(piece, format="s16", layout=f"{count} channels")
            frame.sample_rate, frame.pts, frame.time_base = 48000, place, Fraction(1, 48000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def changing(path):
    """Half of it mono at 44100, the rest stereo at 48000, as ADTS files are joined."""
    mono = write_media(path.with_name("1.ts"), 20, rate=44100)
    return joined_files(path, mono, write_media(path.with_name("2.ts"), 20, rate=48000, layout="stereo"))


def damaged(path):
    """An MP3 with holes in it, and a beginning that is cut."""
    data = bytearray(recording(path, tone(44100), 44100, "libmp3lame").read_bytes())
    for place in range(3000, len(data), 3000):
        data[place : place + 300] = bytes(300)
    path.write_bytes(data[1100:])
    return path


def noisy(seconds=1.5):
    return np.random.default_rng(0).normal(0, 0.1, int(16000 * seconds))


WAVE = tone(16000)[0]
# How it is made, its seconds, what is said, and whether it sounds like the tone.
SPEECH = {
    "one channel": (lambda folder: wav(folder / "a.wav", [WAVE]), 1.5, "", True),
    "nine channels": (lambda folder: wav(folder / "a.wav", [WAVE] * 9), 1.5, "", True),
    "64 channels": (lambda folder: wav(folder / "a.wav", [WAVE] * 64), 1.5, "", True),
    "200 channels": (lambda folder: wav(folder / "a.wav", [WAVE] * 200), 1.5, "", True),
    "one of nine speaks": (lambda folder: wav(folder / "a.wav", [WAVE, *[0 * WAVE] * 8]), 1.5, "", True),
    "nine planes": (lambda folder: opus(folder / "a.mka", 9), 1.5, "", True),
    "64 planes": (lambda folder: opus(folder / "a.mka", 64), 1.5, "", True),
    "32 bits": (lambda folder: wav(folder / "a.wav", [WAVE] * 2, width=4), 1.5, "", True),
    "an odd rate": (lambda folder: wav(folder / "a.wav", tone(22254), 22254), 1.5, "", True),
    "channels that cancel": (
        lambda folder: wav(folder / "a.wav", [0.9 * WAVE, -WAVE]),
        1.5,
        "channels cancel each other when they are mixed; channel 2 of 2 is used alone",
        True,
    ),
    "nearly": (lambda folder: wav(folder / "a.wav", [WAVE, -WAVE + 0.01 * noisy()]), 1.5, "is used alone", True),
    "two voices": (lambda folder: wav(folder / "a.wav", [WAVE, noisy()]), 1.5, "", False),
    "silence": (lambda folder: wav(folder / "a.wav", [0 * WAVE]), 1.5, "is silent", False),
    "silent channels": (lambda folder: wav(folder / "a.wav", [0 * WAVE] * 2), 1.5, "is silent", False),
    "a rate that changes": (lambda folder: changing(folder / "a.ts"), 1.6, "", True),
    "damage": (lambda folder: damaged(folder / "a.mp3"), 1.2, "damaged pieces were skipped", False),
    "a colon": (lambda folder: wav(folder / "take1:2.wav", [WAVE]), 1.5, "", True),
}


@pytest.mark.parametrize("kind", SPEECH)
def test_recordings(tmp_path, monkeypatch, kind):
    make, seconds, said, alike = SPEECH[kind]
    monkeypatch.chdir(tmp_path)
    speech = reader.read_speech(make(tmp_path).relative_to(tmp_path), SPEECH_RATE, (0.4, 200))
    assert said in "".join(speech.notices) and bool(said) == bool(speech.notices)
    assert len(speech.samples) / SPEECH_RATE == pytest.approx(seconds, abs=0.3 if kind == "damage" else 0.06)
    if "silen" in kind:
        assert not speech.samples.any()
        return
    assert loudness(speech.samples, SPEECH_RATE) == pytest.approx(-23, abs=1e-6)
    if alike:
        spectrum = abs(np.fft.rfft(speech.samples[:SPEECH_RATE]))
        assert (
            spectrum[437:444].max() == spectrum.max()
            and np.square(spectrum[430:451]).sum() > 0.9 * np.square(spectrum).sum()
        )


def test_too_little_is_left_of_damage(tmp_path):
    path = recording(tmp_path / "a.mp3", tone(44100, 0.8), 44100, "libmp3lame")
    data = bytearray(path.read_bytes())
    for place in range(1500, len(data), 500):
        data[place : place + 490] = bytes(490)
    path.write_bytes(data)
    with pytest.raises(SkyrunError, match=r"has 0\.\d s of audio, expected 0\.4 to 200 s; .*damaged pieces? w"):
        read_speech(path)


def test_samples_that_are_not_numbers(tmp_path):
    samples = tone(16000)
    samples[0, 100] = np.nan
    with pytest.raises(SkyrunError, match="samples that are infinite or NaN"):
        read_speech(recording(tmp_path / "a.wav", samples, 16000, "pcm_f32le", "flt"))


@pytest.mark.parametrize("rate", [1, 0x7FFFFFFF])
def test_absurd_rates(tmp_path, rate):
    data = bytearray(wav(tmp_path / "a.wav", [WAVE]).read_bytes())
    data[24:28] = rate.to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(data)
    with pytest.raises(SkyrunError, match="samples per second cannot be read|is not a readable recording"):
        read_speech(tmp_path / "a.wav")
