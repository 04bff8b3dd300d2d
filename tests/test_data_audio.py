"""Wave files, MFCC, quantisation, moments, resampling: against the reference's numbers, and with every bad file."""
import importlib
import math

import numpy as np
import pytest
import torch

soundfile = pytest.importorskip("soundfile")
torchaudio = pytest.importorskip("torchaudio")

from s4nb.data.audio import (DROPPED, LAWS, Moments, band_limited, decode_audio, decode_wav,  # noqa: E402
                             drop_samples, encode_audio, mfcc, missing_bytes, normalise, optional, read_wav, resample)

WAVE = (np.sin(np.arange(16_000) / 9) * 20_000).astype("int16")


def numbers(vectors, name):
    file = np.load(vectors / f"{name}.npz", allow_pickle=False)
    return lambda key: torch.from_numpy(file[key])


def wav(path, x=WAVE, rate=16_000, **options):
    soundfile.write(path, x, rate, **options)
    return path


def test_int16_is_exact(tmp_path):
    x = read_wav(wav(tmp_path / "a.wav"), 16_000)
    assert x.dtype == torch.int16 and np.array_equal(x.numpy(), WAVE)
    assert len(read_wav(tmp_path / "a.wav", 16_000, 16_000)) == 16_000


@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE", "PCM_24", "PCM_32"])
def test_other_formats_keep_their_scale(tmp_path, subtype):
    x = np.sin(np.arange(4000) / 9) * 0.7
    got = read_wav(wav(tmp_path / "a.wav", x, subtype=subtype), 16_000).numpy()
    assert np.abs(got - x * 32_768).max() <= 1.01


def test_float_beyond_full_scale_is_clipped(tmp_path):
    x = read_wav(wav(tmp_path / "a.wav", np.array([2.0, -2.0]), subtype="DOUBLE"), 16_000)
    assert x.tolist() == [32_767, -32_768]


def bytes_of(tmp_path, x=WAVE, rate=16_000, cut=None):
    return wav(tmp_path / "x.wav", x, rate).read_bytes()[:cut]


BAD = {"rate": (dict(rate=44_100), "44,100 samples a second, expected 16,000"),
       "stereo": (dict(x=np.stack((WAVE, WAVE), 1)), "2 channels"),
       "cut": (dict(cut=1000), "31,044 bytes are missing"), "header": (dict(cut=30), "not a readable wav file"),
       "nothing": (dict(cut=0), "not a readable wav file (0 bytes)"), "silent": (dict(x=WAVE[:0]), "no samples"),
       "long": (dict(x=np.tile(WAVE, 2)), "32,000 samples, at most 16,000")}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_name_themselves_and_the_fix(tmp_path, case):
    made, text = BAD[case]
    (tmp_path / "word.wav").write_bytes(bytes_of(tmp_path, **made))
    with pytest.raises(ValueError) as e: read_wav(tmp_path / "word.wav", 16_000, 16_000)
    assert text in str(e.value) and "word.wav" in str(e.value)
    assert any(fix in str(e.value) for fix in ("restore or delete it", "sox", "cut it"))


def test_nan_is_refused(tmp_path):
    wav(tmp_path / "a.wav", np.array([0.1, math.nan, 0.2]), subtype="FLOAT")
    with pytest.raises(ValueError, match="a.wav: 1 samples are NaN; restore"): read_wav(tmp_path / "a.wav", 16_000)


def test_the_other_byte_order_is_read_as_strictly(tmp_path):
    data = wav(tmp_path / "a.wav", endian="BIG").read_bytes()
    assert data[:4] == b"RIFX" and np.array_equal(decode_wav(data, "x", 16_000).numpy(), WAVE)
    with pytest.raises(ValueError, match="cut short, 1,000 bytes"): decode_wav(data[:-1000], "x", 16_000)


def test_text_is_no_wav():
    page = b"<html>not found</html>" * 9
    with pytest.raises(ValueError, match="page.wav: not a readable wav"): decode_wav(page, "page.wav", 16_000)


def test_length_unknown_to_a_pipe_is_no_damage(tmp_path):
    for size in (0xffffffff, 0x7ffff000):
        data = bytearray(bytes_of(tmp_path))
        data[40:44] = size.to_bytes(4, "little")
        assert missing_bytes(data) == 0 and len(decode_wav(bytes(data), "x", 16_000)) == 16_000


def test_chunks_before_the_samples_are_passed_over(tmp_path):
    data = bytes_of(tmp_path)
    data = data[:36] + b"LIST" + (5).to_bytes(4, "little") + b"hello\0" + data[36:]
    data = data[:4] + (len(data) - 8).to_bytes(4, "little") + data[8:]
    assert len(decode_wav(data, "x", 16_000)) == 16_000
    with pytest.raises(ValueError, match="cut short, 10 bytes"): decode_wav(data[:-10], "x", 16_000)


def test_a_missing_package_says_what_to_install(monkeypatch):
    def absent(name): raise ImportError(name)
    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ImportError, match='soundfile is needed.*pip install "s4nb'): optional("soundfile")


def test_mfcc_equals_the_reference(vectors):
    v = numbers(vectors, "f_mfcc")
    wave, exact = v("mfcc/wave"), v("mfcc/mfcc_f64")
    assert mfcc(wave).shape == (2, 161, 20)
    assert (mfcc(wave.double()) - exact.transpose(1, 2)).abs().max() < 1e-9
    assert (mfcc(wave) - v("mfcc/mfcc").transpose(1, 2)).abs().max() < 1e-4
    assert (mfcc(wave / 32_768) - v("mfcc/mfcc_div32768").transpose(1, 2)).abs().max() < 1e-4


def test_mfcc_of_other_rates_and_sizes():
    x = torch.randn(3, 8000)
    mel = {"n_fft": 400, "hop_length": 160, "n_mels": 40}
    expected = torchaudio.transforms.MFCC(8000, 13, melkwargs=mel, log_mels=True)(x)
    assert torch.equal(mfcc(x, 8000, 13, 400, 160, 40), expected.transpose(1, 2))
    with pytest.raises(ValueError, match="more than 100 samples, got 100"): mfcc(x[:, :100])


@pytest.mark.parametrize("bits", [4, 8])
def test_quantisation_equals_the_reference(vectors, bits):
    v = numbers(vectors, "f_data")
    for law, key in zip(LAWS, ("mulaw", "lin")):
        codes = v(f"audio_quant/{key}_enc_{bits}")
        assert torch.equal(encode_audio(v("audio_quant/x"), bits, law), codes)
        assert (decode_audio(codes, bits, law) - v(f"audio_quant/{key}_dec_{bits}")).abs().max() < 1e-6
    zero = v(f"audio_quant/qzero_{bits}")
    assert all(decode_audio(zero, bits, law) == 0 for law in LAWS)


def test_discrete_speech_commands_is_torchaudios_grid(vectors):
    v = numbers(vectors, "f_data")
    x = v("audio_quant/x")
    low, high = x.amin((1, 2), keepdim=True), x.amax((1, 2), keepdim=True)
    codes = torchaudio.functional.mu_law_encoding(2 * (x - low) / (high - low) - 1, 256)
    assert torch.equal(codes, v("audio_quant/sc_mulaw_enc").long())
    assert (torchaudio.functional.mu_law_decoding(codes, 256) - v("audio_quant/sc_mulaw_dec")).abs().max() < 1e-6


def test_quantisation_of_silence_and_of_an_unknown_law():
    assert (encode_audio(torch.zeros(1, 5, 1), law="linear") == 0).all()    # a clip's range is its own: no middle
    for call in (encode_audio, decode_audio):
        with pytest.raises(ValueError, match="law 'A' is unknown: one of mu-law, linear"):
            call(torch.zeros(1, 5, 1), law="A")


def test_normalisation_equals_the_reference(vectors):
    v = numbers(vectors, "f_data")
    x, train = v("sc10_split/X"), v("sc10_split/train_idx")
    moments = Moments((0, 1))
    for block in x[train].split(9): moments.add(block)
    assert (normalise(x, moments.mean, moments.std) - v("sc10_split/X_norm")).abs().max() < 1e-5


@pytest.mark.parametrize("over", [(0,), (0, 1)], ids=["time", "feature"])
def test_moments_pass_over_nan(over):
    g = torch.Generator().manual_seed(0)
    x = 1000 + torch.randn(40, 6, 3, dtype=torch.float64, generator=g)
    x[torch.rand(x.shape, generator=g) < 0.3] = math.nan
    moments = Moments(over)
    for block in x.split(11): moments.add(block)
    count = (~x.isnan()).sum(over)
    mean = x.nansum(over) / count
    std = ((x - (mean if over == (0,) else mean[None])).square().nansum(over) / (count - 1)).sqrt()
    assert (moments.mean.squeeze() - mean).abs().max() < 1e-11 and (moments.std.squeeze() - std).abs().max() < 1e-11


def test_resampling_keeps_a_slow_sine():
    t = torch.arange(16_000, dtype=torch.float64) / 16_000
    x = torch.sin(2 * math.pi * 200 * t)[None, :, None]
    assert torch.equal(resample(x, 4), x[:, ::4]) and resample(x, 1.25).shape == (1, 12_800, 1)
    y = resample(x, 1.25)[0, 300:-300, 0]
    expected = torch.sin(2 * math.pi * 200 * torch.arange(12_800, dtype=torch.float64) / 12_800)[300:-300]
    assert (y - expected).abs().max() < 5e-3
    with pytest.raises(ValueError, match="above 0"): resample(x, -1)
    for rate in (22_050 / 16_000, 44_100 / 16_000): assert resample(x, rate).shape[1] == math.ceil(16_000 / rate)


def test_band_limit_removes_what_thinning_folds_back():
    t = torch.arange(16_000, dtype=torch.float64) / 16_000
    x = torch.sin(2 * math.pi * 6000 * t)[None, :, None]
    assert resample(x, 2).square().mean() > 0.4 and band_limited(x, 2, 1)[:, 100:-100].square().mean() < 1e-4


def test_dropped_positions_are_one_stream_from_the_seed():
    g, rows = torch.Generator().manual_seed(56789), torch.randint(-32768, 32768, (3, 1000)).to(torch.int16)
    rows[:, ::50] = -32768
    got = drop_samples(rows, 12.39, torch.Generator().manual_seed(56789))
    for row, before in zip(got, rows):
        gone = torch.zeros(1000, dtype=torch.bool)
        gone[torch.randperm(1000, generator=g)[:123]] = True
        assert ((row == DROPPED) == gone).all() and torch.equal(row[~gone], before[~gone].clamp(min=-32767))
