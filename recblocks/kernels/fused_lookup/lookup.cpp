// Hash, probe and gather in one pass over the ids, for all features of a width; `cpp.py` builds and calls it.
//
// An id costs a cache line of keys, one of rows and one or more of the weight, all of them far away. So ids go by
// blocks, and each step over a block asks for the lines that the next step reads: the waits for memory overlap.
// Plain C++17 with no header of torch: it builds in a second, and what is built fits every version of torch.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <vector>

#ifdef __SSE2__
#include <emmintrin.h>
#endif

namespace {

constexpr int64_t BUCKET = 8;
constexpr int64_t BLOCK = 64;        // ids at a time
constexpr int64_t BAGS = 256;        // bags at a time, at most
constexpr int64_t TURNS = 8;         // of a thread, at least: whoever is done early takes another's
constexpr int64_t THREAD_IDS = 512;  // ids that are worth a thread
constexpr int64_t SUMS = 32768;      // numbers in the sums of bags that are made at a time, at most
constexpr int64_t AHEAD = 256;       // bytes of a row that are asked for; the CPU itself reads on from there
constexpr int64_t LINE = 64;         // bytes of a line of the caches

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15, FIRST = 0xBF58476D1CE4E5B9;

enum Wrong { NOTHING = 0, FEATURE = 1, OFFSETS = 2, ROW = 3 };

struct Table {
    const int64_t* places;  // (4, num_features): part, shift, first row for unseen ids, their number
    int64_t num_features;
    const int64_t* keys;    // (num_buckets, 8)
    const int32_t* rows;    // (num_buckets, 8)
    const int64_t* hashed;  // (3,)
    int64_t num_buckets;
    const int64_t* begins;  // (num_parts + 1,)
    int64_t num_parts;
};

struct Ids {
    const int64_t* ids;
    int64_t num_ids;
    const int64_t* feature;  // each the number of so many ids or bags one after the other
    int64_t repeat;
};

struct Half {
    uint16_t bits;
};

struct Bfloat {
    uint16_t bits;
};

float as_float(float x) { return x; }

float as_float(int8_t x) { return x; }

float as_float(Bfloat x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

float as_float(Half x) {
    constexpr uint32_t exponent = 0x7c00u << 13;
    uint32_t bits = uint32_t(x.bits & 0x7fff) << 13;
    const uint32_t own = bits & exponent;
    bits += (127 - 15) << 23;
    float value;
    if (own == exponent) bits += (128 - 16) << 23;  // infinite or not a number
    if (own == 0) {                                 // below the least normal number: what is behind the point alone
        bits += 1 << 23;
        constexpr uint32_t least = 113u << 23;
        float point;
        std::memcpy(&point, &least, 4);
        std::memcpy(&value, &bits, 4);
        value -= point;
        std::memcpy(&bits, &value, 4);
    }
    bits |= uint32_t(x.bits & 0x8000) << 16;
    std::memcpy(&value, &bits, 4);
    return value;
}

uint64_t mix(uint64_t x) {
    x = (x ^ (x >> 32)) * FIRST;
    return x ^ (x >> 29);
}

int64_t share(uint64_t low_32, int64_t of) { return int64_t(low_32 * uint64_t(of) >> 32); }

int64_t slot_in(int64_t bucket, uint64_t hash, const Table& table) {
    const int64_t* keys = table.keys + bucket * BUCKET;
    int found = -1;
    for (int slot = 0; slot < BUCKET; ++slot) found = uint64_t(keys[slot]) == hash ? slot : found;
    return found < 0 ? -1 : bucket * BUCKET + found;
}

// The rows of the weight for up to BLOCK ids; `recblocks.embedding._gather.lookup_rows` is the definition.
Wrong look_up(const Table& table, const int64_t* ids, const int64_t* feature, int64_t count, int64_t* found) {
    uint64_t hash[BLOCK];
    int64_t at[BLOCK];
    const int64_t* place[4];
    for (int field = 0; field < 4; ++field) place[field] = table.places + field * table.num_features;

    for (int64_t i = 0; i < count; ++i) {
        if (feature[i] < 0 || feature[i] >= table.num_features) return FEATURE;
        if (place[0][feature[i]] < 0 || place[0][feature[i]] >= table.num_parts) return ROW;
        const uint64_t mixed = mix(uint64_t(ids[i]) + uint64_t(table.hashed[0]));
        hash[i] = (mixed + uint64_t(place[0][feature[i]]) * uint64_t(table.hashed[2])) * uint64_t(table.hashed[1]);
        at[i] = share(hash[i] >> 32, table.num_buckets);
        __builtin_prefetch(table.keys + at[i] * BUCKET);
    }
    for (int64_t i = 0; i < count; ++i) {
        at[i] = slot_in(at[i], hash[i], table);
        if (at[i] < 0) __builtin_prefetch(table.keys + share(uint32_t(hash[i]), table.num_buckets) * BUCKET);
        else __builtin_prefetch(table.rows + at[i]);
    }
    for (int64_t i = 0; i < count; ++i) {
        if (at[i] < 0) at[i] = slot_in(share(uint32_t(hash[i]), table.num_buckets), hash[i], table);
        const int64_t row = at[i] < 0 ? -1 : table.rows[at[i]], part = place[0][feature[i]];
        if (row >= 0 && row >= table.begins[part] && row < table.begins[part + 1]) {
            found[i] = row + place[1][feature[i]];
        } else {
            const uint64_t drawn = mix(uint64_t(ids[i]) + GOLDEN) * FIRST >> 32;
            found[i] = place[2][feature[i]] + share(drawn, place[3][feature[i]]);
        }
    }
    return NOTHING;
}

// Counts up numbers that stand for so many things each, one after the other.
class Walk {
public:
    Walk(int64_t repeat, int64_t begin) : number(begin / repeat), passed(begin % repeat), repeat(repeat) {}

    void operator++() { go(1); }

    void go(int64_t by) {
        passed += by;
        if (passed == repeat) {
            passed = 0;
            ++number;
        }
    }

    int64_t number, passed;

private:
    int64_t repeat;
};

// The same for ids that each number of a feature stands for so many of.
Wrong look_up(const Table& table, const Ids& given, int64_t begin, int64_t count, int64_t* found) {
    int64_t feature[BLOCK] = {};
    Walk walk(given.repeat, begin);
    for (int64_t i = 0; i < count; ++i, ++walk) feature[i] = given.feature[walk.number];
    return look_up(table, given.ids + begin, feature, count, found);
}

template <class Element>
struct Weight {
    const Element* rows;  // (num_rows, dim)
    int64_t num_rows, dim;
    const float* scale;  // (num_rows,), or null

    Wrong ask_for(const int64_t* row, int64_t count) const {
        for (int64_t i = 0; i < count; ++i) {
            if (row[i] < 0 || row[i] >= num_rows) return ROW;
            const char* first = reinterpret_cast<const char*>(rows + row[i] * dim);
            const int64_t bytes = std::min<int64_t>(dim * sizeof(Element), AHEAD);
            for (int64_t byte = 0; byte < bytes; byte += LINE) __builtin_prefetch(first + byte);
        }
        return NOTHING;
    }

    template <class Put>
    void each(int64_t row, Put put) const {
        const Element* given = rows + row * dim;
        const float by = scale ? scale[row] : 1.0f;
        for (int64_t column = 0; column < dim; ++column) put(column, as_float(given[column]) * by);
    }

    // The vector of a row, where it is or else made in a place that is given.
    const float* vector(int64_t row, float* place) const {
        if (std::is_same<Element, float>::value && !scale) return reinterpret_cast<const float*>(rows + row * dim);
        each(row, [place](int64_t column, float value) { place[column] = value; });
        return place;
    }

    void add(int64_t row, float* out) const {
        each(row, [out](int64_t column, float value) { out[column] += value; });
    }
};

// Where vectors are put: what comes in a feature after the other, so many rows of each, comes out by rows.
struct Out {
    float* vectors;
    int64_t num_rows, num_features, dim;

    // Past the caches where a vector fills whole lines of them: else each line would be read before it is written.
    void put(const float* vector, const Walk& walk) const {
        float* to = vectors + (walk.passed * num_features + walk.number) * dim;
#ifdef __SSE2__
        if (dim * sizeof(float) % LINE == 0 && reinterpret_cast<uintptr_t>(to) % LINE == 0) {
            for (int64_t at = 0; at < dim; at += 4) _mm_stream_ps(to + at, _mm_loadu_ps(vector + at));
            return;
        }
#endif
        std::memcpy(to, vector, dim * sizeof(float));
    }

    // What was put past the caches is to be seen by other threads.
    void finish() const {
#ifdef __SSE2__
        _mm_sfence();
#endif
    }
};

template <class Element>
Wrong one_each(const Table& table, const Ids& given, const Weight<Element>& weight, int64_t begin, const Out& out) {
    int64_t row[BLOCK];
    const int64_t count = std::min(BLOCK, given.num_ids - begin);
    Wrong wrong = look_up(table, given, begin, count, row);
    if (!wrong) wrong = weight.ask_for(row, count);
    if (wrong) return wrong;
    std::vector<float> place(out.dim);
    Walk walk(out.num_rows, begin);
    for (int64_t i = 0; i < count; ++i, ++walk) out.put(weight.vector(row[i], place.data()), walk);
    out.finish();
    return NOTHING;
}

struct Bags {
    const int64_t* offsets;  // (num_features * num_rows + 1,)
    bool mean;

    int64_t size(int64_t bag) const { return offsets[bag + 1] - offsets[bag]; }
};

// Bags first to last - 1; an id is added where it stands in the order of its bag.
template <class Element>
Wrong pool(const Table& table, const Ids& given, const Weight<Element>& weight, const Bags& bags, int64_t first,
           int64_t last, const Out& out) {
    const bool begins = first > 0 || bags.offsets[0] == 0;
    const bool ends = last < out.num_rows * out.num_features || bags.offsets[last] == given.num_ids;
    if (!begins || !ends || bags.offsets[first] < 0) return OFFSETS;
    for (int64_t bag = first; bag < last; ++bag) {
        if (bags.offsets[bag + 1] < bags.offsets[bag] || bags.offsets[bag + 1] > given.num_ids) return OFFSETS;
    }
    std::vector<float> sums((last - first) * out.dim);
    int64_t feature[BLOCK], row[BLOCK], bag = first;
    float *sum[BLOCK], *of_bag = sums.data();
    const int64_t end = bags.offsets[last];
    Walk numbers(given.repeat, first);
    for (int64_t begin = bags.offsets[first]; begin < end; begin += BLOCK) {
        const int64_t count = std::min(BLOCK, end - begin);
        for (int64_t i = 0; i < count;) {  // an id, or the end of a bag, at a time: no jump that the CPU must guess
            const bool ends = begin + i >= bags.offsets[bag + 1];
            feature[i] = given.feature[numbers.number];
            sum[i] = of_bag;
            i += !ends;
            bag += ends;
            of_bag += ends * out.dim;
            numbers.go(ends);
        }
        Wrong wrong = look_up(table, given.ids + begin, feature, count, row);
        if (!wrong) wrong = weight.ask_for(row, count);
        if (wrong) return wrong;
        for (int64_t i = 0; i < count; ++i) weight.add(row[i], sum[i]);
    }
    of_bag = sums.data();
    Walk walk(out.num_rows, first);
    for (bag = first; bag < last; ++bag, ++walk, of_bag += out.dim) {
        if (bags.mean) {
            const float size = float(std::max<int64_t>(bags.size(bag), 1));
            for (int64_t column = 0; column < out.dim; ++column) of_bag[column] /= size;
        }
        out.put(of_bag, walk);
    }
    out.finish();
    return NOTHING;
}

// Run of 0, step, 2 step ... below end, by as many threads as the ids are worth; the worst of what it says.
template <class Run>
int in_steps(int64_t end, int64_t step, int64_t num_ids, int64_t num_threads, Run run) {
    const int threads = int(std::min(num_threads, 1 + num_ids / THREAD_IDS));
    int wrong = NOTHING;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic) reduction(max : wrong)
    for (int64_t begin = 0; begin < end; begin += step) wrong = std::max(wrong, int(run(begin)));
    return wrong;
}

template <class Element>
int fill(const Out& out, const Ids& given, const Table& table, const void* rows, int64_t num_rows, const float* scale,
         const Bags& bags, int64_t num_threads) {
    const Weight<Element> weight{static_cast<const Element*>(rows), num_rows, out.dim, scale};
    if (!bags.offsets) {
        return in_steps(given.num_ids, BLOCK, given.num_ids, num_threads,
                        [&](int64_t begin) { return one_each(table, given, weight, begin, out); });
    }
    const int64_t num_bags = out.num_rows * out.num_features;
    const int64_t most = std::max<int64_t>(std::min(BAGS, SUMS / out.dim), 1);
    const int64_t step = std::min(most, 1 + num_bags / (TURNS * num_threads));
    return in_steps(num_bags, step, given.num_ids, num_threads, [&](int64_t first) {
        return pool(table, given, weight, bags, first, std::min(first + step, num_bags), out);
    });
}

// The ids of features that lie here and there, and where the bags of each begin among its own, if they are in bags.
struct Apart {
    const int64_t* const* ids;
    const int64_t* sizes;           // how many ids of each
    const int64_t* const* offsets;  // (num_rows + 1,) of each, or null
    int64_t num_features, num_rows;
};

// Whether the offsets run from 0 to the number of ids; they are put down as they run behind ``begin`` ids.
bool move_offsets(const int64_t* offsets, int64_t num_rows, int64_t num_ids, int64_t begin, int64_t* to) {
    bool descend = false;
    for (int64_t row = 0; row < num_rows; ++row) {
        to[row] = begin + offsets[row];
        descend |= offsets[row + 1] < offsets[row];
    }
    return !descend && offsets[0] == 0 && offsets[num_rows] == num_ids;
}

}  // namespace

// Lays features side by side: their ids (N,), and where their bags begin and the last one ends (F B + 1,).
extern "C" int lay(const Apart* apart, int64_t* ids, int64_t* offsets, int64_t num_threads) {
    std::vector<int64_t> begins(apart->num_features + 1);
    std::partial_sum(apart->sizes, apart->sizes + apart->num_features, begins.begin() + 1);
    if (apart->offsets) offsets[apart->num_features * apart->num_rows] = begins.back();
    return in_steps(apart->num_features, 1, begins.back(), num_threads, [&](int64_t at) {
        const int64_t size = apart->sizes[at], rows = apart->num_rows, begin = begins[at];
        std::copy_n(apart->ids[at], size, ids + begin);
        if (!apart->offsets) return NOTHING;
        return move_offsets(apart->offsets[at], rows, size, begin, offsets + at * rows) ? NOTHING : OFFSETS;
    });
}

extern "C" int fill_rows(int64_t* found, const Ids* given, const Table* table, int64_t num_threads) {
    return in_steps(given->num_ids, BLOCK, given->num_ids, num_threads, [&](int64_t begin) {
        return look_up(*table, *given, begin, std::min(BLOCK, given->num_ids - begin), found + begin);
    });
}

extern "C" int fill_vectors(const Out* out, const Ids* given, const Table* table, const void* rows, int64_t element,
                            int64_t num_rows, const float* scale, const int64_t* offsets, int64_t mean,
                            int64_t num_threads) {
    const auto fill_of = element == 0   ? fill<float>
                         : element == 1 ? fill<Half>
                         : element == 2 ? fill<Bfloat>
                                        : fill<int8_t>;
    return fill_of(*out, *given, *table, rows, num_rows, scale, Bags{offsets, mean != 0}, num_threads);
}
