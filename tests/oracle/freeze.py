"""Nagel et al. 2022: frozen weights get no gradient; how they come to be frozen has tests of its own."""

from tests.oracle import Result

NEUTRAL = {"threshold": 1.0}


def expected(case):
    gx = case.g * case.mask
    if case.is_weight:
        gx = gx * (case.state["trend"] != 2)
    return Result(case.y, gx, gx)


def track(codes, momentum, threshold):
    """State of one weight after each of ``codes``, the codes its latent value rounds to, up to its freezing.

    Yields (frequency, average, the code it is frozen on or None).
    """
    last, way, frequency, average = codes[0], 0, 0.0, float(codes[0])
    yield frequency, average, None
    for code in codes[1:]:
        change = code - last
        turned = change != 0 and way != 0 and (change > 0) != (way > 0)
        frequency = momentum * turned + (1 - momentum) * frequency
        stop = round(average) if frequency > threshold else None
        average = momentum * code + (1 - momentum) * average
        last, way = code, change or way
        yield frequency, average, stop
        if stop is not None:
            return
