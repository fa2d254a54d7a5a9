// An ACCEL backend of ggml that computes the products of prompts, MUL_MAT of many rows with a model's weight matrices,
// and attention over a model's KV cache in streams, FLASH_ATTN_EXT of any number of rows.
//
// The weights that decode few rows stay as llama.cpp holds them, repacked or not. For these products panels are made from
// the file's own bytes, so a tensor's data is never read: a weight is known by its address, which is bound to its
// panels, by name, type and shape, while a context is made between `deskside_prefill_bind(model)` and
// `deskside_prefill_bind(nullptr)` on the same thread; so is a KV cache. What is not bound is llama.cpp's, without a change.
#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <new>
#include <shared_mutex>
#include <string>
#include <unordered_map>
#include <vector>

#include "attention.h"
#include "ggml_abi.h"
#include "kernel.h"

static Functions ggml;
static int op_mul_mat, op_attention;

struct Free {
    void operator()(void * data) const { free(data); }
};
template <typename T> using Memory = std::unique_ptr<T[], Free>;
template <typename T> static Memory<T> allocate(size_t count) {
    void * data = aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64);
    if (!data) throw std::bad_alloc();
    return Memory<T>((T *) data);
}
template <typename T> struct Scratch {  // grows, keeps no content
    Memory<T> data;
    size_t size = 0;
    T * room(size_t count) {
        if (count > size) data.reset(), data = allocate<T>(count), size = count;
        return data.get();
    }
};

struct Weights {
    int type;
    int64_t n_k, n_cols;
    Memory<PanelBlock> panels;  // [columns / COLS][k / BLOCK]; or, of 16 bits,
    Memory<WideBlock> wide;     // the same, multiplied as they are

    int64_t n_panels() const { return (n_cols + COLS - 1) / COLS; }
    int64_t n_blocks() const { return n_k / BLOCK; }
    int64_t n_bytes() const { return n_panels() * n_blocks() * (wide ? sizeof(WideBlock) : sizeof(PanelBlock)); }
};

struct Model {
    std::unordered_map<std::string, std::unique_ptr<Weights>> weights;
    std::atomic<int> min_rows{1 << 30};
    std::atomic<bool> attends{false};
    std::atomic<int64_t> n_products{0}, n_attended{0};
};

struct Bound {
    Model * model;
    const Weights * weights;
};

static std::shared_mutex lock;
static std::unordered_map<const void *, Bound> bound;  // by a tensor's data: a weight, or a cache of keys without any
static thread_local Model * binding = nullptr;

// The step between the numbers of a block where its first bytes say it and int8 holds them all; 0: unknown.
static float exact_step(int type, const void * block) {
    if (type != TYPE_Q8_0 && type != TYPE_Q4_0 && type != TYPE_Q5_0 && type != TYPE_IQ4_NL) return 0;
    uint16_t half;
    memcpy(&half, block, sizeof half);
    return half_to_float(half);
}

static void quantize_block(const float * row, float step, PanelBlock & block, int column) {
    float peak = 0;
    for (int k = 0; k < BLOCK; k++) peak = fmaxf(peak, fabsf(row[k]));
    const uint16_t half = float_to_half(step != 0 ? step : peak / 127);
    const float inverse = half_to_float(half) != 0 ? 1 / half_to_float(half) : 0;
    block.scale[column] = half;
    for (int k = 0; k < BLOCK; k++) {
        const float q = fminf(127, fmaxf(-127 - (step != 0), nearbyintf(row[k] * inverse)));
        block.q[k / 2][column][k & 1] = (int8_t) q;
    }
}

static void quantize_block(const float * row, WideBlock & block, int column) {
    int16_t q[BLOCK];
    block.scale[column] = quantize_block(row, q);
    for (int k = 0; k < BLOCK; k++) block.q[k / 2][column][k & 1] = q[k];
}

static void make_panels(Weights & w, const char * bytes, int n_threads) {
    const TypeTraits * traits = ggml.type_traits(w.type);
    const int64_t n_blocks = w.n_blocks(), row_bytes = w.n_k / traits->block * traits->bytes;
    if (w.type == TYPE_F16 || w.type == TYPE_BF16) w.wide = allocate<WideBlock>(w.n_panels() * n_blocks);
    else w.panels = allocate<PanelBlock>(w.n_panels() * n_blocks);
#pragma omp parallel num_threads(n_threads)
    {
        std::vector<float> row(w.n_k);
#pragma omp for
        for (int64_t panel = 0; panel < w.n_panels(); panel++)
            for (int j = 0; j < COLS; j++) {
                const int64_t column = panel * COLS + j;
                const char * source = bytes + column * row_bytes;
                if (column < w.n_cols) traits->to_float(source, row.data(), w.n_k);
                else std::fill(row.begin(), row.end(), 0.f);
                for (int64_t b = 0; b < n_blocks; b++) {
                    if (w.wide) {
                        quantize_block(&row[b * BLOCK], w.wide[panel * n_blocks + b], j);
                        continue;
                    }
                    const float step = column < w.n_cols && traits->block == BLOCK ? exact_step(w.type, source + b * traits->bytes) : 0;
                    quantize_block(&row[b * BLOCK], step, w.panels[panel * n_blocks + b], j);
                }
            }
    }
}

struct Rows {  // [m][k], float32
    const char * data;
    size_t stride;
    int64_t count;
    const float * at(int64_t m) const { return (const float *) (data + m * stride); }
};

struct Context {  // of a backend: what a product needs
    int n_threads = 1;
    Scratch<int16_t> quantized;    // [m / ROWS][k / 2][ROWS][2]
    Scratch<float> scales;         // [m]; or
    Scratch<float> block_scales;   // [m / ROWS][k / BLOCK][ROWS]
    Scratch<int16_t> rows;         // [thread][k]
    Scratch<WideBlock> wide;       // [thread][CHUNK_BLOCKS]
    Scratch<float> vectors;        // [thread][TILE][n_k + n_v]
};

static void pack(Context & ctx, const Weights & w, const Rows & x, int64_t tile, int16_t * row) {
    int32_t * to = (int32_t *) (ctx.quantized.data.get() + tile * w.n_k * ROWS);
    float * block_scales = w.wide ? ctx.block_scales.data.get() + tile * w.n_blocks() * ROWS : nullptr;
    for (int r = 0; r < ROWS; r++) {
        const int64_t m = tile * ROWS + r;
        if (m >= x.count) memset(row, 0, w.n_k * sizeof *row);
        else if (!w.wide) ctx.scales.data[m] = quantize_row(x.at(m), w.n_k, row);
        for (int64_t b = 0; w.wide && b < w.n_blocks(); b++)
            block_scales[b * ROWS + r] = m < x.count ? quantize_block(x.at(m) + b * BLOCK, row + b * BLOCK) : 0;
        for (int64_t p = 0; p < w.n_k / 2; p++) memcpy(to + p * ROWS + r, row + 2 * p, 4);
    }
}

// One panel's columns of the product, chunk by chunk of k; between chunks the sums lie in the result.
static void multiply_panel(const Context & ctx, const Weights & w, const Rows & x, const Rows & y, int64_t panel, WideBlock * widened) {
    const int64_t first = panel * COLS, tiles = (x.count + ROWS - 1) / ROWS, n_blocks = w.n_blocks();
    const int width = (int) std::min<int64_t>(w.n_cols - first, COLS);
    alignas(64) float sums[ROWS * COLS];
    for (int64_t block = 0; block < n_blocks; block += CHUNK_BLOCKS) {
        const int n = (int) std::min<int64_t>(n_blocks - block, CHUNK_BLOCKS);
        const WideBlock * weights = w.wide ? &w.wide[panel * n_blocks + block] : widened;
        if (!w.wide) widen(&w.panels[panel * n_blocks + block], widened, n);
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int height = (int) std::min<int64_t>(x.count - tile * ROWS, ROWS);
            const int16_t * rows = ctx.quantized.data.get() + (tile * w.n_k + block * BLOCK) * ROWS;
            memset(sums, 0, sizeof sums);
            if (block > 0)
                for (int r = 0; r < height; r++) memcpy(sums + r * COLS, y.at(tile * ROWS + r) + first, width * sizeof(float));
            if (w.wide) multiply_blocks<true>(n, rows, ctx.block_scales.data.get() + (tile * n_blocks + block) * ROWS, weights, sums);
            else multiply_blocks<false>(n, rows, nullptr, weights, sums);
            for (int r = 0; r < height; r++) {
                float * row = sums + r * COLS;
                if (!w.wide && block + n == n_blocks)
                    for (int c = 0; c < COLS; c++) row[c] *= ctx.scales.data[tile * ROWS + r];
                memcpy((float *) y.at(tile * ROWS + r) + first, row, width * sizeof(float));
            }
        }
    }
}

static void multiply(Context & ctx, const Weights & w, const Rows & x, const Rows & y, bool packed) {
    const int64_t tiles = (x.count + ROWS - 1) / ROWS;
    ctx.quantized.room(tiles * w.n_k * ROWS), ctx.rows.room(ctx.n_threads * w.n_k), ctx.wide.room(ctx.n_threads * CHUNK_BLOCKS);
    ctx.scales.room(tiles * ROWS), ctx.block_scales.room(w.wide ? tiles * w.n_blocks() * ROWS : 0);
#pragma omp parallel num_threads(ctx.n_threads)
    {
        const int thread = omp_get_thread_num();
        if (!packed) {
#pragma omp for schedule(static)
            for (int64_t tile = 0; tile < tiles; tile++) pack(ctx, w, x, tile, ctx.rows.data.get() + thread * w.n_k);
        }
#pragma omp for schedule(dynamic, 2)
        for (int64_t panel = 0; panel < w.n_panels(); panel++)
            multiply_panel(ctx, w, x, y, panel, ctx.wide.data.get() + thread * CHUNK_BLOCKS);
    }
}

constexpr int TILE = 32;  // vectors of queries that go through the cells together

// Up to TILE vectors of one stream and one head of K and V: `n_heads` heads of queries of the tokens from `token` on.
struct Tile {
    int64_t stream, kv_head, head, token;
    int n_tokens, n_heads;
};

static void attend_tile(const Tensor * y, const Tile & tile, float * scratch) {
    const Tensor *q = y->src[0], *k = y->src[1], *v = y->src[2], *mask = y->src[3];
    const int n_k = (int) k->ne[0], n_v = (int) v->ne[0], n_vectors = tile.n_tokens * tile.n_heads;
    float scale, cap;
    memcpy(&scale, y->op_params, sizeof scale);
    memcpy(&cap, y->op_params + 2, sizeof cap);
    if (cap != 0) scale /= cap;
    Vectors groups[TILE / VECTORS];
    const int n_groups = (n_vectors + VECTORS - 1) / VECTORS;
    const auto address = [&](int i, const Tensor * of, int head_axis, int token_axis) {
        const int64_t head = tile.head + i % tile.n_heads, token = tile.token + i / tile.n_heads;
        return (char *) of->data + head * of->nb[head_axis] + token * of->nb[token_axis] + tile.stream * of->nb[3];
    };
    for (int i = 0; i < n_groups * VECTORS; i++) {
        Vectors & group = groups[i / VECTORS];
        const int r = i % VECTORS, known = i < n_vectors ? i : n_vectors - 1;  // the last fills up its group
        float * to = scratch + i * (int64_t) n_k;
        const auto * from = (const float *) address(known, q, 2, 1);
        for (int d = 0; d < n_k; d++) to[d] = from[d] * scale;
        if (r == 0) group.q = to, group.total = scratch + TILE * (int64_t) n_k + i * (int64_t) n_v;
        group.masks[r] = (const uint16_t *) ((char *) mask->data + (tile.token + known / tile.n_heads) * mask->nb[1] +
                                             tile.stream % mask->ne[3] * mask->nb[3]);
        group.highest[r] = -INFINITY, group.weight[r] = 0;
    }
    memset(groups[0].total, 0, n_groups * VECTORS * n_v * sizeof(float));
    const Cells cells = {(const char *) k->data + tile.kv_head * k->nb[2] + tile.stream * k->nb[3],
                         (const char *) v->data + tile.kv_head * v->nb[2] + tile.stream * v->nb[3], k->nb[1], v->nb[1]};
    for (int64_t first = 0; first < k->ne[1]; first += CELLS) {
        const int n = (int) (k->ne[1] - first < CELLS ? k->ne[1] - first : CELLS);
        for (int g = 0; g < n_groups; g++) attend_block(groups[g], cells, first, n, n_k, n_v, cap);
    }
    for (int i = 0; i < n_vectors; i++) {
        const Vectors & group = groups[i / VECTORS];
        const float weight = group.weight[i % VECTORS], share = weight > 0 ? 1 / weight : 0;
        float * to = (float *) address(i, y, 1, 2);
        for (int d = 0; d < n_v; d++) to[d] = group.total[i % VECTORS * (int64_t) n_v + d] * share;
    }
}

static void attend(Context & ctx, const Tensor * y) {
    const Tensor *q = y->src[0], *k = y->src[1], *v = y->src[2];
    const int64_t n_shared = q->ne[2] / k->ne[2];  // heads of queries to a head of K and V
    const int64_t per_tile = TILE / n_shared, n_tiles = (q->ne[1] + per_tile - 1) / per_tile, size = TILE * (k->ne[0] + v->ne[0]);
    // One tile for several threads: each takes some of its heads, so that none falls asleep.
    const int64_t n_parts = n_tiles * k->ne[2] * q->ne[3] < ctx.n_threads && n_shared > 1 ? 2 : 1, per_part = (n_shared + n_parts - 1) / n_parts;
    float * scratch = ctx.vectors.room(ctx.n_threads * size);
#pragma omp parallel for collapse(4) schedule(dynamic, 1) num_threads(ctx.n_threads)
    for (int64_t tile = n_tiles - 1; tile >= 0; tile--)  // the last tokens see most
        for (int64_t stream = 0; stream < q->ne[3]; stream++)
            for (int64_t head = 0; head < k->ne[2]; head++)
                for (int64_t part = 0; part < n_parts; part++) {
                    const int64_t token = tile * per_tile, first = part * per_part;
                    const int n_tokens = (int) std::min(per_tile, q->ne[1] - token), n_heads = (int) std::min(per_part, n_shared - first);
                    attend_tile(y, {stream, head, head * n_shared + first, token, n_tokens, n_heads}, scratch + omp_get_thread_num() * size);
                }
}

// True if attention over a bound cache is computed here; binds the cache while a context is made.
static Model * find_cache(const Tensor * op) {
    if (op->op != op_attention) return nullptr;
    const Tensor *q = op->src[0], *k = op->src[1], *v = op->src[2], *mask = op->src[3];
    if (!mask || op->src[4] || !k->view_src || !k->view_src->data || k->type != TYPE_F16 || v->type != TYPE_F16) return nullptr;
    if (q->type != TYPE_F32 || mask->type != TYPE_F16 || mask->ne[2] != 1 || q->nb[0] != 4 || op->nb[0] != 4) return nullptr;
    if (k->nb[0] != 2 || v->nb[0] != 2 || k->ne[0] % 16 || v->ne[0] % 16 || q->ne[3] != k->ne[3]) return nullptr;
    if (q->ne[2] % k->ne[2] || q->ne[2] / k->ne[2] > TILE || k->ne[2] != v->ne[2] || op->op_params[1]) return nullptr;
    const void * cache = k->view_src->data;
    {
        std::shared_lock<std::shared_mutex> guard(lock);
        const auto known = bound.find(cache);
        if (known != bound.end()) return known->second.model->attends ? known->second.model : nullptr;
        if (!binding || !binding->attends) return nullptr;
    }
    std::unique_lock<std::shared_mutex> guard(lock);
    return bound.emplace(cache, Bound{binding, nullptr}).first->second.model;
}

// The weights' panels, if `op` is a product of theirs; binds them while a context is made.
static Bound find(const Tensor * op) {
    if (op->op != op_mul_mat) return {};
    const Tensor *w = op->src[0], *x = op->src[1];
    if (w->op != OP_NONE || !w->buffer || !w->data || w->view_src || w->ne[2] * w->ne[3] * x->ne[2] * x->ne[3] != 1) return {};
    if (x->type != TYPE_F32 || x->nb[0] != 4 || op->type != TYPE_F32 || op->nb[0] != 4 || op->op_params[1]) return {};
    {
        std::shared_lock<std::shared_mutex> guard(lock);
        const auto known = bound.find(w->data);
        if (known != bound.end()) return known->second;
        if (!binding) return {};
    }
    const auto named = binding->weights.find(w->name);
    if (named == binding->weights.end()) return {};
    const Weights & weights = *named->second;
    if (weights.type != w->type || weights.n_k != w->ne[0] || weights.n_cols != w->ne[1]) return {};
    std::unique_lock<std::shared_mutex> guard(lock);
    return bound.emplace(w->data, Bound{binding, &weights}).first->second;
}

static const char * backend_name(Backend *) { return "Deskside"; }
static void backend_free(Backend * backend) {
    delete (Context *) backend->context;
    delete backend;
}
static int backend_compute(Backend * backend, Graph * graph) try {
    Context & ctx = *(Context *) backend->context;
    const Tensor * before = nullptr;  // its rows are packed, for weights of 16 bits or not
    bool before_wide = false;
    for (int i = 0; i < ggml.graph_n_nodes(graph); i++) {
        Tensor * y = ggml.graph_node(graph, i);
        if (!(y->flags & FLAG_COMPUTE)) continue;
        if (y->op == op_attention) {
            Model * model = find_cache(y);
            if (!model) return STATUS_FAILED;
            attend(ctx, y);
            model->n_attended++;
        }
        if (y->op != op_mul_mat) continue;
        const Bound found = find(y);
        if (!found.weights) return STATUS_FAILED;
        const Tensor * x = y->src[1];
        const bool wide = found.weights->wide != nullptr;
        multiply(ctx, *found.weights, {(const char *) x->data, x->nb[1], x->ne[1]},
                 {(const char *) y->data, y->nb[1], x->ne[1]}, before == x && before_wide == wide);
        before = x, before_wide = wide;
        found.model->n_products++;
    }
    return STATUS_SUCCESS;
} catch (const std::bad_alloc &) {
    return STATUS_FAILED;
}

static Backend * device_init(Device * device, const char *) {
    static const uint8_t id[16] = {'d', 'e', 's', 'k', 's', 'i', 'd', 'e', ' ', 'p', 'r', 'e', 'f', 'i', 'l', 'l'};
    BackendInterface table = {};
    table.get_name = backend_name;
    table.free = backend_free;
    table.graph_compute = backend_compute;
    return new Backend{&id, table, device, new Context};
}
static const char * device_name(Device *) { return "Deskside"; }
static void device_memory(Device *, size_t * free_bytes, size_t * total) { *free_bytes = *total = 0; }
static int device_type(Device *) { return DEVICE_ACCEL; }
static void device_properties(Device *, DeviceProperties * p) {
    *p = {};
    p->name = p->description = "Deskside";
    p->type = DEVICE_ACCEL;
    p->caps = {false, false, true, false, true};
}
static BufferType * device_buffer_type(Device *) { return ggml.cpu_buffer_type(); }
static Buffer * device_buffer(Device *, void * data, size_t size, size_t) { return ggml.cpu_buffer_from_ptr(data, size); }
static bool device_supports_op(Device *, const Tensor * op) {
    if (op->op == op_attention) return find_cache(op) != nullptr;
    const Bound found = find(op);
    return found.weights && op->src[1]->ne[1] >= found.model->min_rows;
}
static bool device_supports_buffer(Device *, BufferType * type) {
    return ggml.buffer_type_is_host(type) || strcmp(ggml.buffer_type_name(type), "CPU_REPACK") == 0;
}

static void set_threads(Backend * backend, int n) { ((Context *) backend->context)->n_threads = n; }
static const char * registry_name(Registry *) { return "Deskside"; }
static size_t registry_count(Registry *) { return 1; }
static Device * registry_device(Registry * registry, size_t) {
    static Device device = {};
    device.iface.get_name = device.iface.get_description = device_name;
    device.iface.get_memory = device_memory;
    device.iface.get_type = device_type;
    device.iface.get_props = device_properties;
    device.iface.init_backend = device_init;
    device.iface.get_buffer_type = device_buffer_type;
    device.iface.buffer_from_host_ptr = device_buffer;
    device.iface.supports_op = device_supports_op;
    device.iface.supports_buft = device_supports_buffer;
    device.reg = registry;
    return &device;
}
static void * registry_function(Registry *, const char * name) {
    return strcmp(name, "ggml_backend_set_n_threads") == 0 ? (void *) set_threads : nullptr;
}

extern "C" {
// Register the device: contexts made from now on ask it. Once per process.
void deskside_prefill_register(const Functions * functions, int mul_mat, int attention) {
    static Registry registry = {BACKEND_API_VERSION, registry_name, registry_count, registry_device, registry_function, nullptr};
    ggml = *functions;
    op_mul_mat = mul_mat, op_attention = attention;
    ggml.backend_register(&registry);
}

Model * deskside_prefill_new() { return new Model; }

// Make panels of a matrix of `n_cols` rows of `n_k` numbers in the file, whose bytes are needed during the call only.
// The panels' bytes; -1 if it cannot be multiplied here, -2 without memory.
int64_t deskside_prefill_add(Model * model, const char * name, int type, int64_t n_k, int64_t n_cols, const void * bytes, int n_threads) try {
    const TypeTraits * traits = ggml.type_traits(type);
    if (n_k % BLOCK || n_k <= 0 || n_cols <= 0 || !traits || !traits->to_float || traits->block <= 0 || n_k % traits->block) return -1;
    auto w = std::make_unique<Weights>();
    w->type = type, w->n_k = n_k, w->n_cols = n_cols;
    make_panels(*w, (const char *) bytes, n_threads);
    const int64_t size = w->n_bytes();
    model->weights[name] = std::move(w);
    return size;
} catch (const std::bad_alloc &) {
    return -2;
}

// Bind the weights of contexts that this thread makes to the panels of `model`, until it is called with null.
void deskside_prefill_bind(Model * model) { binding = model; }

// Take over products of at least `n` rows in graphs that are built from now on.
void deskside_prefill_min_rows(Model * model, int n) { model->min_rows = n; }

// Take over attention in contexts that are made while the model is bound.
void deskside_prefill_attend(Model * model, int on) { model->attends = on != 0; }

int64_t deskside_prefill_attended(const Model * model) { return model->n_attended; }

// Compute attention, outside of any graph.
void deskside_prefill_compute_attention(const Tensor * y, int n_threads) {
    Context ctx;
    ctx.n_threads = n_threads;
    attend(ctx, y);
}

int64_t deskside_prefill_products(const Model * model) { return model->n_products; }

// Forget the model's weights and free its panels, before the weights themselves are freed.
void deskside_prefill_free(Model * model) {
    {
        std::unique_lock<std::shared_mutex> guard(lock);
        for (auto at = bound.begin(); at != bound.end();) at = at->second.model == model ? bound.erase(at) : std::next(at);
    }
    delete model;
}

// y[m][n_cols] = x[m][n_k] · weights, outside of any graph; 0, or -1 if the weights are not there.
int deskside_prefill_multiply(const Model * model, const char * name, const float * x, int64_t m, float * y, int n_threads) try {
    const auto found = model->weights.find(name);
    if (found == model->weights.end()) return -1;
    const Weights & w = *found->second;
    Context ctx;
    ctx.n_threads = n_threads;
    multiply(ctx, w, {(const char *) x, w.n_k * sizeof(float), m}, {(const char *) y, w.n_cols * sizeof(float), m}, false);
    return 0;
} catch (const std::bad_alloc &) {
    return -1;
}
}
