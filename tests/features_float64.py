"""Log-mel features in float64, frame by frame, written from the definition: what both float32 versions approximate."""

import numpy as np

RATE_HZ, N_FFT, WINDOW, HOP = 16_000, 512, 400, 160


def features_float64(waveform: np.ndarray, mels: int = 80) -> np.ndarray:
    """[S] -> [S // 160, M]; at least two frames."""
    samples = waveform.astype(np.float64)
    emphasised = samples.copy()
    emphasised[1:] -= 0.97 * samples[:-1]
    padded = np.concatenate([np.zeros(N_FFT // 2), emphasised, np.zeros(N_FFT // 2)])
    margin = (N_FFT - WINDOW) // 2
    bank = slaney_bank(mels)
    energies = []
    for frame in range(len(waveform) // HOP):
        start = frame * HOP + margin
        windowed = np.hanning(WINDOW) * padded[start : start + WINDOW]
        energies.append(bank @ np.abs(np.fft.rfft(windowed, N_FFT)) ** 2)
    log_mel = np.log(np.array(energies) + 2.0**-24)
    return (log_mel - log_mel.mean(0)) / (log_mel.std(0, ddof=1) + 1e-5)


def slaney_bank(mels: int) -> np.ndarray:
    """[M, 257]: triangles between equal steps of Slaney's mel scale, of unit area in Hz."""
    edges = [_hz(mel) for mel in np.linspace(0, _mel(RATE_HZ / 2), mels + 2)]
    bank = np.zeros((mels, N_FFT // 2 + 1))
    for row, (low, centre, high) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        for column in range(N_FFT // 2 + 1):
            hz = column * RATE_HZ / N_FFT
            if low < hz <= centre:
                bank[row, column] = (hz - low) / (centre - low)
            elif centre < hz < high:
                bank[row, column] = (high - hz) / (high - centre)
        bank[row] *= 2 / (high - low)
    return bank


def _mel(hz: float) -> float:
    """200/3 Hz a mel up to 1000 Hz, then 27 mels for every factor of 6.4."""
    return hz * 3 / 200 if hz < 1000 else 15 + 27 * np.log(hz / 1000) / np.log(6.4)


def _hz(mel: float) -> float:
    return mel * 200 / 3 if mel < 15 else 1000 * 6.4 ** ((mel - 15) / 27)
