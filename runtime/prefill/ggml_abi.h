// What a backend must know of ggml's binary interface (backend API version 2, ggml 0.25, as in llama-cpp-python 0.3.36),
// declared here because the installed package has libraries and no headers. `build.py` names the releases for which these
// declarations are proved; others run without this backend. The functions arrive as addresses, so nothing is linked.
#pragma once

#include <cstddef>
#include <cstdint>

constexpr int BACKEND_API_VERSION = 2;

enum : int { OP_NONE = 0 };                      // enum ggml_op; the other numbers are passed in
enum : int { TYPE_F32 = 0, TYPE_F16 = 1, TYPE_Q4_0 = 2, TYPE_Q5_0 = 6, TYPE_Q8_0 = 8, TYPE_IQ4_NL = 20, TYPE_BF16 = 30 };
enum : int { DEVICE_ACCEL = 3 };                 // enum ggml_backend_dev_type
enum : int { STATUS_FAILED = -1, STATUS_SUCCESS = 0 };  // enum ggml_status
constexpr int32_t FLAG_COMPUTE = 16;             // GGML_TENSOR_FLAG_COMPUTE

struct Graph;
struct Device;
struct Buffer;
struct BufferType;

struct Tensor {
    int type;
    Buffer * buffer;
    int64_t ne[4];
    size_t nb[4];
    int op;
    int32_t op_params[16];
    int32_t flags;
    Tensor * src[10];
    Tensor * view_src;
    size_t view_offs;
    void * data;
    char name[64];
    void * extra;
    char padding[8];
};

struct TypeTraits {
    const char * name;
    int64_t block, block_interleave;
    size_t bytes;
    bool is_quantized;
    void (*to_float)(const void *, float *, int64_t);
    void (*from_float)(const float *, void *, int64_t);
};

struct BackendInterface {
    const char * (*get_name)(struct Backend *);
    void (*free)(struct Backend *);
    void * transfers[6];  // asynchronous copies, synchronize
    void * plans[4];
    int (*graph_compute)(struct Backend *, Graph *);
    void * events[2];
    void * graph_optimize;
};

struct Backend {
    const uint8_t (*guid)[16];
    BackendInterface iface;
    Device * device;
    void * context;
};

struct DeviceProperties {
    const char *name, *description;
    size_t memory_free, memory_total;
    int type;
    const char * device_id;
    struct {
        bool async, host_buffer, buffer_from_host_ptr, events, mmap_support;
    } caps;
};

struct DeviceInterface {
    const char * (*get_name)(Device *);
    const char * (*get_description)(Device *);
    void (*get_memory)(Device *, size_t * free, size_t * total);
    int (*get_type)(Device *);
    void (*get_props)(Device *, DeviceProperties *);
    Backend * (*init_backend)(Device *, const char *);
    BufferType * (*get_buffer_type)(Device *);
    void * get_host_buffer_type;
    Buffer * (*buffer_from_host_ptr)(Device *, void *, size_t, size_t);
    bool (*supports_op)(Device *, const Tensor *);
    bool (*supports_buft)(Device *, BufferType *);
    void * offload_op;
    void * events[3];
};

struct Registry;

struct Device {
    DeviceInterface iface;
    Registry * reg;
    void * context;
};

struct Registry {
    int api_version;
    const char * (*get_name)(Registry *);
    size_t (*get_device_count)(Registry *);
    Device * (*get_device)(Registry *, size_t);
    void * (*get_proc_address)(Registry *, const char *);
    void * context;
};

// ggml's own functions, in the order of `backend.py`.
struct Functions {
    void (*backend_register)(Registry *);
    BufferType * (*cpu_buffer_type)();
    Buffer * (*cpu_buffer_from_ptr)(void *, size_t);
    const char * (*buffer_type_name)(BufferType *);
    bool (*buffer_type_is_host)(BufferType *);
    int (*graph_n_nodes)(Graph *);
    Tensor * (*graph_node)(Graph *, int);
    const TypeTraits * (*type_traits)(int);
};
