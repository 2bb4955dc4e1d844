// Hash, probe and gather in one pass over the ids, for all features; `cpp.py` builds and calls it.
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
constexpr int64_t AHEAD = 256;       // bytes of a row that are asked for; the CPU itself reads on from there
constexpr int64_t LINE = 64;         // bytes of a line of the caches

constexpr uint64_t GOLDEN = 0x9E3779B97F4A7C15, FIRST = 0xBF58476D1CE4E5B9;

enum Wrong { NOTHING = 0, FEATURE = 1, OFFSETS = 2, ROW = 3 };

struct Table {
    // (7, num_features): part, shift, first row for unseen ids, their number; weight, first column, whether a mean
    const int64_t* places;
    int64_t num_features;
    const int64_t* keys;    // (num_buckets, 8)
    const int32_t* rows;    // (num_buckets, 8)
    const int64_t* hashed;  // (3,)
    int64_t num_buckets;
    const int64_t* begins;  // (num_parts + 1,)
    int64_t num_parts;

    int64_t of(int64_t feature, int64_t field) const { return places[field * num_features + feature]; }

    bool has(int64_t feature) const { return feature >= 0 && feature < num_features; }
};

enum Field { PART, SHIFT, FIRST_UNSEEN, NUM_UNSEEN, WEIGHT, COLUMN, MEAN };

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

// The rows of the weights for up to BLOCK ids; `recblocks.embedding._gather.lookup_rows` is the definition.
Wrong look_up(const Table& table, const int64_t* ids, const int64_t* feature, int64_t count, int64_t* found) {
    uint64_t hash[BLOCK];
    int64_t at[BLOCK];
    const int64_t *part = table.places, *shift = part + SHIFT * table.num_features;
    const int64_t *first = part + FIRST_UNSEEN * table.num_features, *num_unseen = first + table.num_features;

    for (int64_t i = 0; i < count; ++i) {
        if (!table.has(feature[i])) return FEATURE;
        if (part[feature[i]] < 0 || part[feature[i]] >= table.num_parts) return ROW;
        const uint64_t mixed = mix(uint64_t(ids[i]) + uint64_t(table.hashed[0]));
        hash[i] = (mixed + uint64_t(part[feature[i]]) * uint64_t(table.hashed[2])) * uint64_t(table.hashed[1]);
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
        const int64_t row = at[i] < 0 ? -1 : table.rows[at[i]], own = part[feature[i]];
        if (row >= 0 && row >= table.begins[own] && row < table.begins[own + 1]) {
            found[i] = row + shift[feature[i]];
        } else {
            const uint64_t drawn = mix(uint64_t(ids[i]) + GOLDEN) * FIRST >> 32;
            found[i] = first[feature[i]] + share(drawn, num_unseen[feature[i]]);
        }
    }
    return NOTHING;
}

// Counts up numbers that stand for so many things each, one after the other.
class Walk {
public:
    Walk(int64_t repeat, int64_t begin) : number(begin / repeat), passed(begin % repeat), repeat(repeat) {}

    void operator++() {
        if (++passed == repeat) {
            passed = 0;
            ++number;
        }
    }

    int64_t number, passed;

private:
    int64_t repeat;
};

// The feature of each id, where each number stands for so many of them.
void features_of(const Ids& given, int64_t begin, int64_t count, int64_t* feature) {
    Walk walk(given.repeat, begin);
    for (int64_t i = 0; i < count; ++i, ++walk) feature[i] = given.feature[walk.number];
}

// Run of the first and behind the last of those that are of one feature, and so on; what is wrong in one of them.
template <class Run>
Wrong by_feature(const int64_t* feature, int64_t count, Run run) {
    Wrong wrong = NOTHING;
    for (int64_t begin = 0, end = 0; begin < count && !wrong; begin = end) {
        while (end < count && feature[end] == feature[begin]) ++end;
        wrong = run(begin, end);
    }
    return wrong;
}

// A weight as it is given, and one whose elements are known.
struct Rows {
    const void* rows;  // (num_rows, dim)
    int64_t num_rows, dim;
    const float* scale;  // (num_rows,), or null
};

template <class Element>
struct Weight : Rows {
    Weight(const Rows& given) : Rows(given) {}

    const Element* at(int64_t row) const { return static_cast<const Element*>(rows) + row * dim; }

    Wrong ask_for(const int64_t* row, int64_t count) const {
        const int64_t bytes = std::min<int64_t>(dim * sizeof(Element), AHEAD);
        for (int64_t i = 0; i < count; ++i) {
            if (row[i] < 0 || row[i] >= num_rows) return ROW;
            const char* first = reinterpret_cast<const char*>(at(row[i]));
            for (int64_t byte = 0; byte < bytes; byte += LINE) __builtin_prefetch(first + byte);
        }
        return NOTHING;
    }

    template <class Put>
    void each(int64_t row, Put put) const {
        const Element* given = at(row);
        const float by = scale ? scale[row] : 1.0f;
        for (int64_t column = 0; column < dim; ++column) put(column, as_float(given[column]) * by);
    }

    // The vector of a row, where it is or else made in a place that is given.
    const float* vector(int64_t row, float* place) const {
        if (std::is_same<Element, float>::value && !scale) return reinterpret_cast<const float*>(at(row));
        each(row, [place](int64_t column, float value) { place[column] = value; });
        return place;
    }
};

// Where vectors are put: the first so many in a row each, then as many in other columns of the same rows, and so on.
struct Out {
    float* vectors;
    int64_t num_rows, num_columns;

    // Past the caches where a vector fills whole lines of them: else each line would be read before it is written.
    void put(const float* vector, int64_t dim, int64_t row, int64_t column) const {
        float* to = vectors + row * num_columns + column;
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

// What one call is about.
template <class Element>
struct Task {
    const Out& out;
    const Ids& given;
    const Table& table;
    std::vector<Weight<Element>> weights;
    int64_t widest;

    Task(const Out& out, const Ids& given, const Table& table, const Rows* every, int64_t num_weights)
        : out(out), given(given), table(table), weights(every, every + num_weights), widest(0) {
        for (const auto& weight : weights) widest = std::max(widest, weight.dim);
    }

    const Weight<Element>& weight_of(int64_t feature) const { return weights[table.of(feature, WEIGHT)]; }

    // Whether there is such a feature, of a weight that there is, and its columns are in the output.
    Wrong check(int64_t feature) const {
        if (!table.has(feature)) return FEATURE;
        const int64_t which = table.of(feature, WEIGHT), column = table.of(feature, COLUMN);
        if (which < 0 || which >= int64_t(weights.size())) return ROW;
        return column < 0 || column > out.num_columns - weights[which].dim ? ROW : NOTHING;
    }

    // The rows of up to BLOCK ids of features that are checked; their lines are asked for.
    Wrong rows_of(const int64_t* ids, const int64_t* feature, int64_t count, int64_t* row) const {
        const Wrong wrong = look_up(table, ids, feature, count, row);
        if (wrong) return wrong;
        return by_feature(feature, count, [&](int64_t begin, int64_t end) {
            return weight_of(feature[begin]).ask_for(row + begin, end - begin);
        });
    }
};

template <class Element>
Wrong one_each(const Task<Element>& task, int64_t begin) {
    int64_t feature[BLOCK] = {}, row[BLOCK];
    const int64_t count = std::min(BLOCK, task.given.num_ids - begin);
    features_of(task.given, begin, count, feature);
    Wrong wrong = by_feature(feature, count, [&](int64_t at, int64_t) { return task.check(feature[at]); });
    if (!wrong) wrong = task.rows_of(task.given.ids + begin, feature, count, row);
    if (wrong) return wrong;
    std::vector<float> place(task.widest);
    Walk walk(task.out.num_rows, begin);
    by_feature(feature, count, [&](int64_t at, int64_t end) {
        const Weight<Element> weight = task.weight_of(feature[at]);
        const int64_t column = task.table.of(feature[at], COLUMN);
        for (; at < end; ++at, ++walk) {
            task.out.put(weight.vector(row[at], place.data()), weight.dim, walk.passed, column);
        }
        return NOTHING;
    });
    task.out.finish();
    return NOTHING;
}

struct Bags {
    const int64_t* offsets;  // (num_bags + 1,)
    int64_t num_bags;
};

// Bags first to last - 1, one after the other, in the order of their ids.
template <class Element>
Wrong pool(const Task<Element>& task, const Bags& bags, int64_t first, int64_t last) {
    const Ids& given = task.given;
    const bool begins = first > 0 || bags.offsets[0] == 0;
    const bool ends = last < bags.num_bags || bags.offsets[last] == given.num_ids;
    if (!begins || !ends || bags.offsets[first] < 0) return OFFSETS;
    int64_t of_bag[BAGS] = {};
    features_of(given, first, last - first, of_bag);
    const Wrong wrong = by_feature(of_bag, last - first, [&](int64_t at, int64_t) { return task.check(of_bag[at]); });
    if (wrong) return wrong;
    for (int64_t bag = first; bag < last; ++bag) {
        if (bags.offsets[bag + 1] < bags.offsets[bag] || bags.offsets[bag + 1] > given.num_ids) return OFFSETS;
    }
    const std::vector<float> zeros(task.widest);
    std::vector<float> place(task.widest);
    const float* sum = zeros.data();  // of what was seen of a bag: a vector where it lies, or else what is in the place
    Walk walk(task.out.num_rows, first);
    int64_t bag = first, bag_of_id = first;
    const auto close = [&] {
        const int64_t own = of_bag[bag - first], dim = task.weight_of(own).dim;
        const int64_t num = bags.offsets[bag + 1] - bags.offsets[bag];
        if (num > 1 && task.table.of(own, MEAN)) {
            for (int64_t column = 0; column < dim; ++column) place[column] /= float(num);
        }
        task.out.put(sum, dim, walk.passed, task.table.of(own, COLUMN));
        sum = zeros.data();
        ++bag;
        ++walk;
    };
    int64_t feature[BLOCK] = {}, row[BLOCK];
    const bool all_alike = first / given.repeat == (last - 1) / given.repeat;
    const int64_t end = bags.offsets[last];
    for (int64_t begin = bags.offsets[first]; begin < end; begin += BLOCK) {
        const int64_t count = std::min(BLOCK, end - begin);
        if (all_alike) std::fill_n(feature, count, of_bag[0]);
        for (int64_t i = 0; i < count && !all_alike;) {  // an id, or the end of a bag, at a time: no jump to be guessed
            const bool over = begin + i >= bags.offsets[bag_of_id + 1];
            feature[i] = of_bag[bag_of_id - first];
            bag_of_id += over;
            i += !over;
        }
        const Wrong wrong = task.rows_of(given.ids + begin, feature, count, row);
        if (wrong) return wrong;
        by_feature(feature, count, [&](int64_t i, int64_t behind) {
            const Weight<Element> weight = task.weight_of(feature[i]);
            for (; i < behind; ++i) {
                while (bags.offsets[bag + 1] <= begin + i) close();
                if (bags.offsets[bag] == begin + i) {
                    sum = weight.vector(row[i], place.data());
                } else {
                    weight.each(row[i], [&](int64_t column, float value) { place[column] = sum[column] + value; });
                    sum = place.data();
                }
            }
            return NOTHING;
        });
    }
    while (bag < last) close();
    task.out.finish();
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
int fill(const Task<Element>& task, const Bags& bags, int64_t num_threads) {
    const int64_t num_ids = task.given.num_ids;
    if (!bags.offsets) {
        return in_steps(num_ids, BLOCK, num_ids, num_threads, [&](int64_t begin) { return one_each(task, begin); });
    }
    const int64_t turns = num_threads > 1 ? TURNS * num_threads : 1;
    const int64_t step = std::min(BAGS, 1 + bags.num_bags / turns);
    return in_steps(bags.num_bags, step, num_ids, num_threads, [&](int64_t first) {
        return pool(task, bags, first, std::min(first + step, bags.num_bags));
    });
}

// The ids of features that lie here and there, and where the bags of each begin among its own, if they are in bags.
struct Apart {
    const int64_t* const* ids;
    const int64_t* sizes;           // how many ids of each
    const int64_t* const* offsets;  // (num_rows + 1,) of each, null where a row is one id; or null
    int64_t num_features, num_rows;
};

// Each feature by itself, as if it were all that is given; the threads share the features.
template <class Element>
int fill_each(const Out& out, const Apart& apart, const Table& table, const Rows* every, int64_t num_weights,
              int64_t num_threads) {
    const int64_t num_ids = std::accumulate(apart.sizes, apart.sizes + apart.num_features, int64_t(0));
    return in_steps(apart.num_features, 1, num_ids, num_threads, [&](int64_t feature) {
        const Ids given{apart.ids[feature], apart.sizes[feature], &feature, apart.num_rows};
        const Task<Element> task(out, given, table, every, num_weights);
        return Wrong(fill(task, Bags{apart.offsets[feature], apart.num_rows}, 1));
    });
}

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
        if ((size && !apart->ids[at]) || (apart->offsets && !apart->offsets[at])) return OFFSETS;
        std::copy_n(apart->ids[at], size, ids + begin);
        if (!apart->offsets) return NOTHING;
        return move_offsets(apart->offsets[at], rows, size, begin, offsets + at * rows) ? NOTHING : OFFSETS;
    });
}

extern "C" int fill_rows(int64_t* found, const Ids* given, const Table* table, int64_t num_threads) {
    return in_steps(given->num_ids, BLOCK, given->num_ids, num_threads, [&](int64_t begin) {
        int64_t feature[BLOCK] = {};
        const int64_t count = std::min(BLOCK, given->num_ids - begin);
        features_of(*given, begin, count, feature);
        return look_up(*table, given->ids + begin, feature, count, found + begin);
    });
}

struct Weights {
    const Rows* every;
    int64_t num_weights;
    int64_t element;
};

template <class Fill>
int by_element(int64_t element, Fill fill) {
    switch (element) {
        case 0: return fill(float());
        case 1: return fill(Half());
        case 2: return fill(Bfloat());
        default: return fill(int8_t());
    }
}

extern "C" int fill_vectors(const Out* out, const Ids* given, const Table* table, const Weights* weights,
                            const int64_t* offsets, int64_t num_bags, int64_t num_threads) {
    return by_element(weights->element, [&](auto element) {
        const Task<decltype(element)> task(*out, *given, *table, weights->every, weights->num_weights);
        return fill(task, Bags{offsets, num_bags}, num_threads);
    });
}

extern "C" int fill_apart(const Out* out, const Apart* apart, const Table* table, const Weights* weights,
                          int64_t num_threads) {
    return by_element(weights->element, [&](auto element) {
        using Element = decltype(element);
        return fill_each<Element>(*out, *apart, *table, weights->every, weights->num_weights, num_threads);
    });
}
