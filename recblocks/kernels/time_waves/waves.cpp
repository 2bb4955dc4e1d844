// Cosines and sines of times, a row of them for each time; `cpp.py` builds and calls it.
//
// A place within a period is a count of 2**-32 of a turn, so that integers drop the whole turns and no wave needs more
// than its fraction. Every wave is a sine: a cosine is one that is a quarter of a turn ahead.

#include <cmath>
#include <cstdint>
#include <vector>

#include "../every_width.h"

namespace {

constexpr int64_t STEP = 512;  // times at a time
constexpr double TURN = 6.283185307179586;

struct Times {
    const int64_t* whole;  // (num_times,)
    const int64_t* part;   // (num_times,) in 2**-32, or null
    int64_t num_times;
};

// What there is of each column.
struct Columns {
    std::vector<uint64_t> whole, part;  // 2**-64 of a turn in a unit of time, and in 2**-32 of one
    std::vector<uint32_t> ahead;        // 2**-32 of a turn
    std::vector<float> added;           // 0, or what is no number of a phase that is none
};

Columns columns_of(const int64_t* frequencies, const float* phase, int64_t num_periods, int64_t quarters) {
    const int64_t num = 2 * num_periods;
    Columns columns{std::vector<uint64_t>(num), std::vector<uint64_t>(num), std::vector<uint32_t>(num),
                    std::vector<float>(num)};
    for (int64_t at = 0; at < num; ++at) {
        columns.whole[at] = uint64_t(frequencies[at / 2]);
        columns.part[at] = uint64_t(frequencies[num_periods + at / 2]);
        columns.ahead[at] = uint32_t(quarters + (at % 2 ? 0 : 1)) << 30;
        if (!phase) continue;
        columns.added[at] = 0.0f * phase[at];
        if (!std::isfinite(phase[at])) continue;
        const double turns = phase[at] / TURN;
        columns.ahead[at] += uint32_t(uint64_t((turns - std::floor(turns)) * 4294967296.0));
    }
    return columns;
}

// sin(2π turn / 2³²): the turn from −½ to ½, folded into −¼ to ¼, where a polynomial is within 5e-9.
inline float sine(uint32_t turn) {
    const int32_t near = int32_t(turn);
    const int32_t folded = (near ^ int32_t(turn << 1)) < 0 ? int32_t(0x80000000u - turn) : near;
    const float x = float(folded) * float(TURN / 4294967296.0), square = x * x;
    const float more = -0.16666657f + square * (0.008333017f + square * (-0.00019806615f + square * 2.6000548e-6f));
    return x + x * square * more;
}

EVERY_WIDTH void put(float* to, uint64_t whole, const uint64_t* of_whole, const uint32_t* ahead, const float* added,
                     int64_t num) {
    for (int64_t at = 0; at < num; ++at) to[at] = sine(uint32_t(whole * of_whole[at] >> 32) + ahead[at]) + added[at];
}

EVERY_WIDTH void put_parts(float* to, uint64_t whole, uint64_t part, const uint64_t* of_whole, const uint64_t* of_part,
                           const uint32_t* ahead, const float* added, int64_t num) {
    for (int64_t at = 0; at < num; ++at) {
        const uint64_t turn = whole * of_whole[at] + part * of_part[at];
        to[at] = sine(uint32_t(turn >> 32) + ahead[at]) + added[at];
    }
}

}  // namespace

// A row of ``num_columns`` numbers for each time, of which the first 2 num_periods are written.
extern "C" int fill(float* out, int64_t num_columns, const Times* times, const int64_t* frequencies, const float* phase,
                    int64_t num_periods, int64_t quarters, int64_t num_threads) {
    const Columns columns = columns_of(frequencies, phase, num_periods, quarters);
    const int64_t num = times->num_times;
#pragma omp parallel for num_threads(num_threads) if (num > STEP)
    for (int64_t begin = 0; begin < num; begin += STEP) {
        for (int64_t at = begin; at < num && at < begin + STEP; ++at) {
            float* to = out + at * num_columns;
            const uint64_t whole = uint64_t(times->whole[at]);
            if (times->part) {
                put_parts(to, whole, uint64_t(times->part[at]), columns.whole.data(), columns.part.data(),
                          columns.ahead.data(), columns.added.data(), 2 * num_periods);
            } else {
                put(to, whole, columns.whole.data(), columns.ahead.data(), columns.added.data(), 2 * num_periods);
            }
        }
    }
    return 0;
}
