// Looks at the tensors of a batch of features: whether all are as they must be, and where they lie.
//
// Hundreds of them are cold in the caches, and Python, which asks each for its dtype, its shape, its memory and so on,
// takes longer over them than the lookup over the memory. Here each is looked at once, through torch's own C exchange
// of DLPack. No header of Python or torch: `apart.py` gives the functions.

#include <cstddef>
#include <cstdint>

namespace {

// What DLPack says of a tensor, as every version 1 lays it out.
struct Tensor {
    void* data;
    int32_t device_type, device_index;
    int32_t num_dims;
    uint8_t kind, bits;
    uint16_t lanes;
    const int64_t* shape;
    const int64_t* strides;
    uint64_t byte_offset;
};

constexpr int32_t CPU = 1;
constexpr uint8_t SIGNED = 0;

// Functions of Python's stable interface, torch's, and the types that are looked for.
struct Python {
    void* (*list_item)(void*, ptrdiff_t);
    void* (*tuple_item)(void*, ptrdiff_t);
    ptrdiff_t (*tuple_size)(void*);
    void* (*type_of)(void*);
    void (*let_go)(void*);
    int (*tell)(void*, Tensor*);
    const void *tensor, *tuple;

    bool is_a(void* object, const void* type) const {
        void* own = type_of(object);
        let_go(own);
        return own == type;
    }
};

struct Numbers {
    const int64_t* begin = nullptr;
    int64_t size = 0;
};

// Whether it is a tensor, no subclass, of int64 one behind the other in the memory of a CPU.
bool numbers_of(const Python& python, void* object, Numbers* found) {
    Tensor tensor;
    if (!python.is_a(object, python.tensor) || python.tell(object, &tensor)) return false;
    if (tensor.device_type != CPU || tensor.kind != SIGNED || tensor.bits != 64 || tensor.num_dims != 1) return false;
    if ((tensor.strides && tensor.strides[0] != 1) || (tensor.shape[0] && !tensor.data)) return false;
    found->begin = reinterpret_cast<const int64_t*>(static_cast<const char*>(tensor.data) + tensor.byte_offset);
    found->size = tensor.shape[0];
    return true;
}

}  // namespace

// Of each feature, which is ids or a pair of ids and offsets: its ids, how many, and its offsets, null without any.
// The number of rows, which all have; -1 where one is not as it must be, rows differ, or there are fewer than these.
extern "C" int64_t look(const Python* python, void* features, int64_t num_features, int64_t least_rows,
                        const int64_t** ids, int64_t* sizes, const int64_t** offsets) {
    int64_t num_rows = -1;
    for (int64_t at = 0; at < num_features; ++at) {
        void* given = python->list_item(features, at);
        const bool in_bags = python->is_a(given, python->tuple);
        if (in_bags && python->tuple_size(given) != 2) return -1;
        Numbers own, begins;
        if (!numbers_of(*python, in_bags ? python->tuple_item(given, 0) : given, &own)) return -1;
        if (in_bags && !numbers_of(*python, python->tuple_item(given, 1), &begins)) return -1;
        const int64_t rows = in_bags ? begins.size - 1 : own.size;
        if (rows < least_rows || (at > 0 && rows != num_rows)) return -1;
        num_rows = rows;
        ids[at] = own.begin;
        sizes[at] = own.size;
        offsets[at] = begins.begin;
    }
    return num_rows;
}
