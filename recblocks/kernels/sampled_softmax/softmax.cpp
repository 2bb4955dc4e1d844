// Rows of logits become their exponentials, a row at a time while it is in the cache; `cpp.py` builds and calls it.

#include <cmath>
#include <cstdint>
#include <cstring>

#include "../every_width.h"

namespace {

// What each row of a tile owns: `Owned` of `own_positives.py`.
struct Owned {
    const int64_t *pair_first, *pair_count, *column_first, *column_count, *columns;
};

constexpr int64_t LANES = 32;      // columns at a time
constexpr int64_t ADDED = 32;      // how often a sum in float is added to before it goes to the one in double
constexpr float LEAST = -87.0f;    // e**x of less is no normal number, and here 0
constexpr float ROUND = 12582912;  // 1.5 * 2**23: added and taken off again, it leaves the nearest whole number

// e**x, of x up to 0 or NaN: 2**n e**r, |r| <= log(2) / 2, of whose series the eighth power is below 2**-27.
inline float exponential(float x) {
    const float within = x >= LEAST ? x : LEAST;
    const float whole = (within * 1.44269504f + ROUND) - ROUND;
    const float r = (within - whole * 0.693359375f) + whole * 2.12194440e-4f;  // log(2) in two, the first of 9 bits
    const float more = 1 / 24.0f + r * (1 / 120.0f + r * (1 / 720.0f + r * (1 / 5040.0f)));
    const float power = 1 + (r + r * r * (0.5f + r * (1 / 6.0f + r * more)));
    const int32_t bits = (int32_t(whole) + 127) << 23;
    float scale;
    std::memcpy(&scale, &bits, sizeof scale);
    return x < LEAST ? 0 : power * scale + (x - within);  // which adds nothing but NaN
}

inline float larger(float x, float y) { return x > y ? x : y; }

// Columns get their bias, but for masked ones, whose bias may be NaN; the largest of each lane so far.
inline void correct(float* columns, const float* bias, float* peaks) {
    for (int64_t lane = 0; bias && lane < LANES; ++lane) {
        columns[lane] = columns[lane] == -INFINITY ? columns[lane] : columns[lane] + bias[lane];
    }
    for (int64_t lane = 0; lane < LANES; ++lane) peaks[lane] = larger(columns[lane], peaks[lane]);
}

inline void exponentiate(float* columns, float peak, float* sums) {
    for (int64_t lane = 0; lane < LANES; ++lane) {
        columns[lane] = exponential(columns[lane] - peak);
        sums[lane] += columns[lane];
    }
}

// Brings columns of the next row, which is this thread's next, into the cache while this row is computed.
inline void fetch(const float* columns) {
    for (int64_t lane = 0; lane < LANES; lane += 16) __builtin_prefetch(columns + lane, 1);
}

inline void mask(float* row, const Owned& own, int64_t at) {
    for (int64_t pair = own.pair_first[at]; pair < own.pair_first[at] + own.pair_count[at]; ++pair) {
        const int64_t* columns = own.columns + own.column_first[pair];
        for (int64_t k = 0; k < own.column_count[pair]; ++k) row[columns[k]] = -INFINITY;
    }
}

// The logits less the row's largest become exponentials. Returns the row's log-sum-exp, -inf where all its logits are,
// and writes the exponentials' sum, 1 in such a row.
EVERY_WIDTH float exponentials(float* row, const float* bias, int64_t num, float* total) {
    const int64_t whole = num - num % LANES;
    float last[LANES], last_bias[LANES] = {}, peaks[LANES];  // what is left over is masked up to a whole number of lanes
    for (int64_t lane = 0; lane < LANES; ++lane) last[lane] = peaks[lane] = -INFINITY;
    for (int64_t at = whole; at < num; ++at) last[at - whole] = row[at];
    for (int64_t at = whole; bias && at < num; ++at) last_bias[at - whole] = bias[at];

    for (int64_t at = 0; at < whole; at += LANES) correct(row + at, bias ? bias + at : nullptr, peaks);
    correct(last, last_bias, peaks);
    float peak = -INFINITY;
    for (int64_t lane = 0; lane < LANES; ++lane) peak = larger(peaks[lane], peak);
    if (peak == -INFINITY) peak = 0;

    double sum = 0;
    for (int64_t begin = 0; begin <= whole; begin += ADDED * LANES) {
        float sums[LANES] = {};
        const int64_t end = begin + ADDED * LANES;
        for (int64_t at = begin; at < whole && at < end; at += LANES) {
            fetch(row + num + at);
            exponentiate(row + at, peak, sums);
        }
        if (whole < end) exponentiate(last, peak, sums);
        for (int64_t lane = 0; lane < LANES; ++lane) sum += sums[lane];
    }
    for (int64_t at = whole; at < num; ++at) row[at] = last[at - whole];
    *total = sum == 0 ? 1 : float(sum);
    return float(peak + std::log(sum));
}

}  // namespace

// Of each of ``num_rows`` rows the exponentials of logits + bias, 0 in the columns it owns, in place, their sum and the
// log-sum-exp. No bias and nothing owned are null.
extern "C" int softmax_rows(float* tile, const float* bias, float* log_sum_exp, float* totals,
                            const int64_t* pair_first, const int64_t* pair_count, const int64_t* column_first,
                            const int64_t* column_count, const int64_t* columns, int64_t num_rows, int64_t num_columns,
                            int64_t num_threads) {
    const Owned own = {pair_first, pair_count, column_first, column_count, columns};
#pragma omp parallel for num_threads(num_threads) if (num_rows > 1)
    for (int64_t at = 0; at < num_rows; ++at) {
        float* row = tile + at * num_columns;
        if (columns) mask(row, own, at);
        log_sum_exp[at] = exponentials(row, bias, num_columns, totals + at);
    }
    return 0;
}
