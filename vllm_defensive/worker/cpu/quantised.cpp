// Quantised head pages on CPUs: writing them, and attention over them. `native.py` compiles this file and calls it.
//
// Where everything lies in such a page is said in kernels/vllm_defensive_kernels/widths.py; here the K codes of a channel
// lie together. The formulas are those of quantised.py beside it, which the tests hold this file to. Numbers are widened
// to fp32 in registers, page by page: nothing is unpacked to memory.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

enum Dtype { F32 = 0, BF16 = 1, F16 = 2 };

template <int L>
struct Lanes {  // L numbers at a time, whatever the machine has
    typedef float f32 __attribute__((vector_size(4 * L)));
    typedef int32_t i32 __attribute__((vector_size(4 * L)));
    typedef uint32_t u32 __attribute__((vector_size(4 * L)));
    typedef uint16_t u16 __attribute__((vector_size(2 * L)));
    typedef uint8_t u8 __attribute__((vector_size(L)));
};

template <class To, class From>
inline To bits_of(From from) {
    static_assert(sizeof(To) == sizeof(From), "as many bits");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

template <class T>
inline T read(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof(value));
    return value;
}

inline float from_half(uint16_t half) {
    const float magnitude = bits_of<float>(uint32_t(half & 0x7fff) << 13) * 0x1p112f;
    return half & 0x8000 ? -magnitude : magnitude;
}

inline uint16_t to_half(float number) {  // to the nearest, ties to even; beyond the largest: that one
    const uint32_t bits = bits_of<uint32_t>(number), sign = bits >> 16 & 0x8000;
    uint32_t magnitude = bits & 0x7fffffff;
    if (magnitude >= 0x477fe000) return uint16_t(sign | 0x7bff);
    if (magnitude < 0x38800000)  // counted in units of 2^-24, which are the last place of numbers from 0.5 on
        return uint16_t(sign | (bits_of<uint32_t>(bits_of<float>(magnitude) + 0.5f) - 0x3f000000));
    magnitude += 0xc8000fff + (magnitude >> 13 & 1);
    return uint16_t(sign | magnitude >> 13);
}

inline uint16_t to_bfloat(float number) {
    const uint32_t bits = bits_of<uint32_t>(number);
    if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

template <int DTYPE>
inline float number_at(const void* data, int64_t index) {
    if (DTYPE == F32) return static_cast<const float*>(data)[index];
    const uint16_t bits = static_cast<const uint16_t*>(data)[index];
    return DTYPE == BF16 ? bits_of<float>(uint32_t(bits) << 16) : from_half(bits);
}

template <int DTYPE>
inline void store(void* data, int64_t index, float number) {
    if (DTYPE == F32)
        static_cast<float*>(data)[index] = number;
    else
        static_cast<uint16_t*>(data)[index] = DTYPE == BF16 ? to_bfloat(number) : to_half(number);
}

template <int DTYPE, int L>
inline typename Lanes<L>::f32 numbers_at(const void* data, int64_t index) {
    typedef Lanes<L> V;
    if constexpr (DTYPE == F32) {
        return read<typename V::f32>(static_cast<const float*>(data) + index);
    } else {
        const auto wide = __builtin_convertvector(
            read<typename V::u16>(static_cast<const uint16_t*>(data) + index), typename V::u32);
        if constexpr (DTYPE == BF16) return bits_of<typename V::f32>(wide << 16);
        const auto magnitude = bits_of<typename V::u32>(bits_of<typename V::f32>((wide & 0x7fff) << 13) * 0x1p112f);
        return bits_of<typename V::f32>(magnitude | (wide & 0x8000) << 16);
    }
}

// ---- where a page's numbers are read: (row, column) -> L numbers of a row, not yet times their step

template <int DTYPE>
struct Numbers {  // as the cache has them
    const void* data;
    int64_t row_numbers;
    template <int L>
    typename Lanes<L>::f32 load(int row, int column) const {
        return numbers_at<DTYPE, L>(data, row * row_numbers + column);
    }
};

template <int L>
inline typename Lanes<L>::f32 widened(typename Lanes<L>::u8 code) {  // in steps, for which compilers find instructions
    typedef Lanes<L> V;
    const auto wider = __builtin_convertvector(code, typename V::u16);
    return __builtin_convertvector(__builtin_convertvector(wider, typename V::i32), typename V::f32);
}

struct Bytes {
    const uint8_t* data;
    int64_t row_bytes;
    template <int L>
    typename Lanes<L>::f32 load(int row, int column) const {
        return widened<L>(read<typename Lanes<L>::u8>(data + row * row_bytes + column));
    }
};

struct KeyNibbles {  // rows are channels: that of c and that of c + half share theirs
    const uint8_t* data;
    int64_t row_bytes;
    int half;
    template <int L>
    typename Lanes<L>::f32 load(int row, int column) const {
        const int high = row >= half;
        const auto code = read<typename Lanes<L>::u8>(data + (row - high * half) * row_bytes + column);
        return widened<L>(high ? code >> 4 : code & 15);
    }
};

struct ValueNibbles {  // columns are channels
    const uint8_t* data;
    int half;
    template <int L>
    typename Lanes<L>::f32 load(int row, int column) const {
        const int high = column >= half;
        const auto code = read<typename Lanes<L>::u8>(data + int64_t(row) * half + column - high * half);
        return widened<L>(high ? code >> 4 : code & 15);
    }
};

// ---- attention

constexpr int TOKENS_AT_ONCE = 32;  // two vectors a query row
constexpr int ROWS = 16;            // query rows that share what is read

template <int M, class Source>
void logits(const Source& key, const float* query, int head_size, int tokens, const float* constant, float* out,
            int out_stride) {
    typedef Lanes<16>::f32 f32;
    for (int t = 0; t < tokens; t += TOKENS_AT_ONCE) {
        f32 sum[M][2];
        for (int m = 0; m < M; m++) sum[m][0] = sum[m][1] = f32{} + constant[m];
        for (int d = 0; d < head_size; d++) {
            const f32 first = key.template load<16>(d, t), second = key.template load<16>(d, t + 16);
            for (int m = 0; m < M; m++) {
                const float q = query[m * head_size + d];
                sum[m][0] += q * first;
                sum[m][1] += q * second;
            }
        }
        for (int m = 0; m < M; m++) std::memcpy(out + m * out_stride + t, sum[m], sizeof(sum[m]));
    }
}

template <int M, int L, class Source>
void add_values(const Source& value, const float* weight, int weight_stride, int head_size, int tokens, float* acc) {
    typedef typename Lanes<L>::f32 f32;
    for (int d = 0; d < head_size; d += 2 * L) {
        const bool both = d + L < head_size;
        f32 sum[M][2] = {};
        for (int t = 0; t < tokens; t++) {
            const f32 first = value.template load<L>(t, d);
            const f32 second = both ? value.template load<L>(t, d + L) : f32{};
            for (int m = 0; m < M; m++) {
                const float w = weight[m * weight_stride + t];
                sum[m][0] += w * first;
                sum[m][1] += w * second;
            }
        }
        for (int m = 0; m < M; m++)
            for (int part = 0; part < 1 + both; part++) {
                float* to = acc + m * head_size + d + part * L;
                const f32 total = read<f32>(to) + sum[m][part];
                std::memcpy(to, &total, sizeof(total));
            }
    }
}

inline Lanes<16>::f32 exponential(Lanes<16>::f32 x) {  // of x <= 0, to 2 units in the last place
    typedef Lanes<16> V;
    x = x > -87.0f ? x : V::f32{} - 87.0f;
    const V::f32 scaled = x * 1.44269504088896341f - 0.5f;
    const V::i32 whole = __builtin_convertvector(scaled, V::i32);  // towards zero: rounded, as scaled is negative
    const V::f32 n = __builtin_convertvector(whole, V::f32);
    const V::f32 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    V::f32 y = V::f32{} + 1.9875691500e-4f;
    y = y * r + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    return y * bits_of<V::f32>((whole + 127) << 23);
}

struct Geometry {  // of one class of pages: where the codes begin, as widths.py says
    int key_bits, value_bits, tokens;
    int64_t keys_at, values_at;
};

Geometry geometry(int key_bits, int value_bits, int tokens, int head_size) {
    const int64_t header = (4 * int64_t(head_size + tokens) + 15) / 16 * 16;
    return {key_bits, value_bits, tokens, header, header + int64_t(tokens) * head_size * key_bits / 8};
}

struct Cache {
    const uint8_t* data;
    int64_t page_bytes;
    int page_tokens, head_size;
    const int32_t *key_order, *value_order;  // null: K by channel, V by token
};

template <int DTYPE>
class Attention {  // of some query rows over one head's pages, by an online softmax
    typedef Lanes<16>::f32 f32;

  public:
    // cap: logits are bent to cap * tanh(logit / cap); 0: they are not
    Attention(const Cache& cache, int most_tokens, float cap)
        : cache_(cache), cap_(cap), stride_(padded(most_tokens)), plain_stride_(padded(cache.page_tokens)),
          query_(ROWS * cache.head_size), scaled_(ROWS * cache.head_size), acc_(ROWS * cache.head_size),
          weight_(ROWS * stride_), key_header_(2 * cache.head_size), value_step_(stride_), value_minimum_(stride_) {
        if (cache.key_order) {
            key_.resize(size_t(cache.head_size) * plain_stride_);
            value_.resize(size_t(cache.head_size) * cache.page_tokens);
        }
    }

    // nothing: of each of `heads` query heads the logit of what has no value, or null; rows are of one after the other
    void begin(const void* query, int rows, float scale, const float* nothing, int heads) {
        rows_ = rows;
        for (int i = 0; i < rows * cache_.head_size; i++) query_[i] = number_at<DTYPE>(query, i) * scale;
        std::fill(acc_.begin(), acc_.end(), 0.0f);
        std::fill(best_, best_ + ROWS, -std::numeric_limits<float>::infinity());
        std::fill(total_, total_ + ROWS, 0.0f);
        for (int m = 0; nothing && m < rows; m++) {
            best_[m] = nothing[m % heads];
            total_[m] = 1.0f;
        }
    }

    // sees: how many of the page's tokens each row attends to, none of them more than `tokens`
    void add_plain(int64_t page, int tokens, const int* sees) {
        const uint8_t* at = cache_.data + page * cache_.page_bytes;
        const int head_size = cache_.head_size, page_tokens = cache_.page_tokens;
        const float zero[ROWS] = {};
        if (!cache_.key_order) {
            const Numbers<DTYPE> key{at, page_tokens}, value{at + cache_.page_bytes / 2, head_size};
            all_logits(key, query_.data(), zero, tokens);
            soften(sees, tokens, nullptr, nullptr);
            all_values<16>(value, tokens);
            return;
        }
        for (int t = 0; t < tokens; t++)
            for (int d = 0; d < head_size; d++) {
                key_[d * plain_stride_ + t] = number_at<DTYPE>(at, cache_.key_order[t * head_size + d]);
                value_[t * head_size + d] =
                    number_at<DTYPE>(at + cache_.page_bytes / 2, cache_.value_order[t * head_size + d]);
            }
        all_logits(Numbers<F32>{key_.data(), plain_stride_}, query_.data(), zero, tokens);
        soften(sees, tokens, nullptr, nullptr);
        all_values<16>(Numbers<F32>{value_.data(), head_size}, tokens);
    }

    void add_quantised(int64_t page, const Geometry& g, int tokens) {
        const uint8_t* at = cache_.data + page * cache_.page_bytes;
        const int head_size = cache_.head_size;
        const uint16_t* header = reinterpret_cast<const uint16_t*>(at);
        widen_halves(header, 2 * head_size, key_header_.data());
        const float *step = key_header_.data(), *minimum = step + head_size;
        float constant[ROWS];
        for (int m = 0; m < rows_; m++) {
            const float* query = &query_[m * head_size];
            f32 sum = {};
            for (int d = 0; d < head_size; d += 16) {
                const f32 q = read<f32>(query + d), scaled = q * read<f32>(step + d);
                sum += q * read<f32>(minimum + d);
                std::memcpy(&scaled_[m * head_size + d], &scaled, sizeof(scaled));
            }
            constant[m] = total_of(sum);
        }
        if (g.key_bits == 8)
            all_logits(Bytes{at + g.keys_at, g.tokens}, scaled_.data(), constant, tokens);
        else
            all_logits(KeyNibbles{at + g.keys_at, g.tokens, head_size / 2}, scaled_.data(), constant, tokens);
        int sees[ROWS];
        std::fill(sees, sees + ROWS, tokens);
        const uint16_t* value_header = header + 2 * head_size;
        widen_halves(value_header, tokens, value_step_.data());
        widen_halves(value_header + g.tokens, tokens, value_minimum_.data());
        soften(sees, tokens, value_step_.data(), value_minimum_.data());
        if (g.value_bits == 8)
            all_values<16>(Bytes{at + g.values_at, head_size}, tokens);
        else if (head_size % 32 == 0)
            all_values<16>(ValueNibbles{at + g.values_at, head_size / 2}, tokens);
        else
            all_values<8>(ValueNibbles{at + g.values_at, head_size / 2}, tokens);
    }

    void end(void* out) const {
        for (int m = 0; m < rows_; m++)
            for (int d = 0; d < cache_.head_size; d++)
                store<DTYPE>(out, m * cache_.head_size + d, acc_[m * cache_.head_size + d] / total_[m]);
    }

  private:
    template <class Source>
    void all_logits(const Source& key, const float* query, const float* constant, int tokens) {
        const int head_size = cache_.head_size;
        int m = 0;
        for (; m + 4 <= rows_; m += 4)
            logits<4>(key, query + m * head_size, head_size, tokens, constant + m, &weight_[m * stride_], stride_);
        const float* rest = query + m * head_size;
        float* out = &weight_[m * stride_];
        if (rows_ - m == 3) logits<3>(key, rest, head_size, tokens, constant + m, out, stride_);
        if (rows_ - m == 2) logits<2>(key, rest, head_size, tokens, constant + m, out, stride_);
        if (rows_ - m == 1) logits<1>(key, rest, head_size, tokens, constant + m, out, stride_);
    }

    template <int L, class Source>
    void all_values(const Source& value, int tokens) {
        const int head_size = cache_.head_size;
        int m = 0;
        for (; m + 4 <= rows_; m += 4)
            add_values<4, L>(value, &weight_[m * stride_], stride_, head_size, tokens, &acc_[m * head_size]);
        const float* rest = &weight_[m * stride_];
        float* acc = &acc_[m * head_size];
        if (rows_ - m == 3) add_values<3, L>(value, rest, stride_, head_size, tokens, acc);
        if (rows_ - m == 2) add_values<2, L>(value, rest, stride_, head_size, tokens, acc);
        if (rows_ - m == 1) add_values<1, L>(value, rest, stride_, head_size, tokens, acc);
    }

    // Logits become weights, what was there before shrinks to match; steps and minima of values are taken care of.
    void soften(const int* sees, int tokens, const float* step, const float* minimum) {
        const float lowest = -std::numeric_limits<float>::infinity();
        const int padded = (tokens + 15) / 16 * 16;
        for (int m = 0; m < rows_; m++) {
            float *weight = &weight_[m * stride_], *acc = &acc_[m * cache_.head_size];
            if (sees[m] <= 0) {
                std::fill(weight, weight + padded, 0.0f);
                continue;
            }
            for (int t = 0; cap_ && t < padded; t += 16) {
                const f32 some = bent(read<f32>(weight + t));
                std::memcpy(weight + t, &some, sizeof(some));
            }
            std::fill(weight + sees[m], weight + std::max(padded, sees[m]), lowest);
            f32 high = f32{} + best_[m];
            for (int t = 0; t < padded; t += 16) {
                const f32 logit = read<f32>(weight + t);
                high = logit > high ? logit : high;
            }
            const float best = largest_of(high);
            if (best > best_[m]) {
                const float decay = best_[m] == lowest ? 0.0f : std::exp(best_[m] - best);
                total_[m] *= decay;
                for (int d = 0; d < cache_.head_size; d++) acc[d] *= decay;
                best_[m] = best;
            }
            for (int t = 0; t < padded; t += 16) {
                const f32 some = exponential(read<f32>(weight + t) - best);
                std::memcpy(weight + t, &some, sizeof(some));
            }
            std::fill(weight + sees[m], weight + std::max(padded, sees[m]), 0.0f);
            f32 sum = {}, offset = {};
            for (int t = 0; t < padded; t += 16) {
                const f32 some = read<f32>(weight + t);
                sum += some;
                if (!step) continue;
                offset += some * read<f32>(minimum + t);
                const f32 scaled = some * read<f32>(step + t);
                std::memcpy(weight + t, &scaled, sizeof(scaled));
            }
            total_[m] += total_of(sum);
            if (!step) continue;
            const float all = total_of(offset);
            for (int d = 0; d < cache_.head_size; d++) acc[d] += all;
        }
    }

    // With e = exp(-2|y|), tanh |y| = (1 - e) / (1 + e).
    f32 bent(f32 logit) const {
        const f32 size = logit < 0.0f ? -logit : logit, e = exponential(size * (-2.0f / cap_));
        const f32 end = cap_ * (1.0f - e) / (1.0f + e);
        return logit < 0.0f ? -end : end;
    }

    static int padded(int tokens) { return (tokens + TOKENS_AT_ONCE - 1) / TOKENS_AT_ONCE * TOKENS_AT_ONCE; }

    // fp16 to fp32, 16 at a time; what is read beyond the last one becomes zero.
    static void widen_halves(const uint16_t* half, int count, float* out) {
        for (int i = 0; i < count; i += 16) {
            const f32 some = numbers_at<F16, 16>(half, i);
            std::memcpy(out + i, &some, sizeof(some));
        }
        std::fill(out + count, out + (count + 15) / 16 * 16, 0.0f);
    }

    static float total_of(f32 numbers) {
        float sum = 0;
        for (int i = 0; i < 16; i++) sum += numbers[i];
        return sum;
    }

    static float largest_of(f32 numbers) {
        float largest = numbers[0];
        for (int i = 1; i < 16; i++) largest = std::max(largest, numbers[i]);
        return largest;
    }

    const Cache cache_;
    const float cap_;
    const int stride_, plain_stride_;
    int rows_ = 0;
    std::vector<float> query_, scaled_, acc_, weight_, key_header_, value_step_, value_minimum_, key_, value_;
    float best_[ROWS], total_[ROWS];
};

struct Rows {  // sequences of one KV head each; see native.py
    int64_t sequences, table_stride;
    const int32_t *query_start, *table, *shared_pages, *class_pages, *class_tokens, *growth_tokens;
    int group, classes;
    const int32_t* class_shape;  // of each class: bits of keys, of values, tokens of a page
    const float* nothing;        // of each sequence and query head, or null: see Attention::begin
};

template <int DTYPE>
void attend(const void* query, void* out, const Cache& cache, const Rows& rows, float scale, float cap) {
    std::vector<Geometry> classes;
    int most = cache.page_tokens;
    for (int c = 0; c < rows.classes; c++) {
        const int32_t* shape = rows.class_shape + 3 * c;
        classes.push_back(geometry(shape[0], shape[1], shape[2], cache.head_size));
        most = std::max(most, int(shape[2]));
    }
    // Of a row with many query tokens, as many at a time as make up ROWS; each walks over the pages once.
    const int tokens_at_once = std::max(1, ROWS / rows.group);
    std::vector<std::pair<int32_t, int32_t>> tasks;
    for (int64_t r = 0; r < rows.sequences; r++)
        for (int32_t t = rows.query_start[r]; t < rows.query_start[r + 1]; t += tokens_at_once) tasks.push_back({r, t});
    const int64_t number_bytes = DTYPE == F32 ? 4 : 2, token_bytes = number_bytes * rows.group * cache.head_size;
    const int heads_at_once = std::min(rows.group, ROWS);
#pragma omp parallel
    {
        Attention<DTYPE> attention(cache, most, cap);
#pragma omp for schedule(dynamic, 1)
        for (size_t task = 0; task < tasks.size(); task++) {
            const auto [r, first] = tasks[task];
            const int32_t* table = rows.table + r * rows.table_stride;
            const int length = rows.query_start[r + 1] - rows.query_start[r], begin = first - rows.query_start[r];
            const int tokens = std::min(tokens_at_once, length - begin), growth = rows.growth_tokens[r];
            for (int g = 0; g < rows.group; g += heads_at_once) {
                const int heads = std::min(heads_at_once, rows.group - g);
                const int count = tokens * heads;
                const int64_t offset = first * token_bytes + g * number_bytes * cache.head_size;
                const float* nothing = rows.nothing ? rows.nothing + r * rows.group + g : nullptr;
                attention.begin(static_cast<const uint8_t*>(query) + offset, count, scale, nothing, heads);
                int sees[ROWS], page = 0;
                std::fill(sees, sees + ROWS, cache.page_tokens);
                for (; page < rows.shared_pages[r]; page++) attention.add_plain(table[page], cache.page_tokens, sees);
                for (int c = 0; c < rows.classes; c++) {
                    int left = rows.class_tokens[r * rows.classes + c];
                    const int end = page + rows.class_pages[r * rows.classes + c];
                    for (int p = page; p < end && left > 0; p++, left -= classes[c].tokens) {
                        const int held = std::min(left, classes[c].tokens);
                        if (classes[c].key_bits < 16) {
                            attention.add_quantised(table[p], classes[c], held);
                        } else {
                            std::fill(sees, sees + ROWS, held);
                            attention.add_plain(table[p], held, sees);
                        }
                    }
                    page = end;
                }
                for (int start = 0; start < growth; start += cache.page_tokens, page++) {
                    const int held = std::min(growth - start, cache.page_tokens);
                    for (int m = 0; m < count; m++) {  // the row's last query token sees all
                        const int seen = growth - (length - 1 - (begin + m / heads)) - start;
                        sees[m] = std::max(0, std::min(held, seen));
                    }
                    attention.add_plain(table[page], held, sees);
                }
                attention.end(static_cast<uint8_t*>(out) + offset);
            }
        }
    }
}

// ---- packing

struct Tokens {  // K [H, tokens, D], and V of the last of these tokens
    const void *key, *value;
    int64_t key_tokens, value_tokens;
};

// Codes of `count` numbers that lie `stride` apart.
inline void quantise(const float* number, int count, int stride, int bits, uint16_t* step_out, uint16_t* minimum_out,
                     uint8_t* code, int code_stride) {
    const int levels = (1 << bits) - 1;
    float low = std::numeric_limits<float>::infinity(), high = -low;
    for (int i = 0; i < count; i++) {
        low = std::min(low, number[i * stride]);
        high = std::max(high, number[i * stride]);
    }
    if (!count) low = high = 0;
    *minimum_out = to_half(std::max(-65504.0f, std::min(65504.0f, low)));
    const float minimum = from_half(*minimum_out);
    *step_out = to_half(std::max(0.0f, std::min(65504.0f, (high - minimum) / float(levels))));
    if (*step_out == 0) *step_out = 0x3c00;
    const float step = from_half(*step_out);
    for (int i = 0; i < count; i++) {
        const float at = std::nearbyint((number[i * stride] - minimum) / step);
        code[i * code_stride] = uint8_t(std::max(0.0f, std::min(float(levels), at)));
    }
}

template <int DTYPE>
void pack(const Tokens& tokens, const int32_t* token, const int32_t* head, const int64_t* target, int64_t pages,
          uint8_t* data, int64_t page_bytes, int head_size, const Geometry& g) {
#pragma omp parallel
    {
        std::vector<float> key(size_t(g.tokens) * head_size), value(key.size());
        std::vector<uint8_t> code(key.size());
#pragma omp for schedule(static)
        for (int64_t p = 0; p < pages; p++) {
            const int32_t* kept = token + p * g.tokens;
            int count = 0;
            for (; count < g.tokens && kept[count] >= 0; count++) {
                const int64_t key_row = head[p] * tokens.key_tokens + kept[count];
                const int64_t value_row =
                    head[p] * tokens.value_tokens + kept[count] - (tokens.key_tokens - tokens.value_tokens);
                for (int d = 0; d < head_size; d++) {  // K by channel, as it will lie
                    key[d * g.tokens + count] = number_at<DTYPE>(tokens.key, key_row * head_size + d);
                    value[count * head_size + d] = number_at<DTYPE>(tokens.value, value_row * head_size + d);
                }
            }
            uint8_t* page = data + target[p] * page_bytes;
            std::memset(page, 0, page_bytes);
            uint16_t* header = reinterpret_cast<uint16_t*>(page);
            std::fill(code.begin(), code.end(), 0);
            for (int d = 0; d < head_size; d++)
                quantise(&key[d * g.tokens], count, 1, g.key_bits, header + d, header + head_size + d,
                         &code[d * g.tokens], 1);
            const int64_t half = int64_t(g.tokens) * head_size / 2;
            if (g.key_bits == 8)
                std::memcpy(page + g.keys_at, code.data(), 2 * half);
            else
                for (int64_t i = 0; i < half; i++) page[g.keys_at + i] = uint8_t(code[i] | code[i + half] << 4);
            uint16_t* steps = header + 2 * head_size;
            for (int t = 0; t < g.tokens; t++) {
                uint8_t* row = &code[t * head_size];
                std::fill(row, row + head_size, 0);
                quantise(&value[t * head_size], t < count ? head_size : 0, 1, g.value_bits, steps + t,
                         steps + g.tokens + t, row, 1);
                uint8_t* to = page + g.values_at + int64_t(t) * head_size * g.value_bits / 8;
                if (g.value_bits == 8)
                    std::memcpy(to, row, head_size);
                else
                    for (int d = 0; d < head_size / 2; d++) to[d] = uint8_t(row[d] | row[d + head_size / 2] << 4);
            }
        }
    }
}

}  // namespace

#ifndef NUMBERS
#error "define NUMBERS, the type of what the cache holds: F32, BF16 or F16"
#endif

extern "C" {

void vllm_defensive_attend(const void* query, void* out, const void* data, int64_t page_bytes, int page_tokens,
                           int head_size, const int32_t* key_order, const int32_t* value_order, int64_t sequences,
                           const int32_t* query_start, const int32_t* table, int64_t table_stride,
                           const int32_t* shared_pages, const int32_t* class_pages, const int32_t* class_tokens,
                           const int32_t* growth_tokens, int group, int classes, const int32_t* class_shape, const float* nothing,
                           float scale, float cap) {
    const Cache cache{static_cast<const uint8_t*>(data), page_bytes, page_tokens, head_size, key_order, value_order};
    const Rows rows{sequences,    table_stride,  query_start, table,   shared_pages, class_pages,
                    class_tokens, growth_tokens, group,       classes, class_shape,  nothing};
    attend<NUMBERS>(query, out, cache, rows, scale, cap);
}

void vllm_defensive_pack(const void* key, const void* value, int64_t key_tokens, int64_t value_tokens,
                         const int32_t* token, const int32_t* head, const int64_t* target, int64_t pages, void* data,
                         int64_t page_bytes, int head_size, int key_bits, int value_bits, int page_tokens) {
    pack<NUMBERS>(Tokens{key, value, key_tokens, value_tokens}, token, head, target, pages, static_cast<uint8_t*>(data),
                  page_bytes, head_size, geometry(key_bits, value_bits, page_tokens, head_size));
}

}  // extern "C"
