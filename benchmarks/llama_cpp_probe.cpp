// What llama.cpp computes with a GGUF file: logits of given tokens, a greedy continuation, and how it splits a text.
//
//   llama_cpp_probe MODEL.gguf TOKENS LOGITS GREEDY N [TEXT IDS]
//
// TOKENS holds int32 ids; LOGITS receives float32 [tokens, vocabulary]; GREEDY receives N int32 ids. TEXT is a UTF-8
// file whose ids, without special tokens added, are written to IDS. One thread, float32 cache, no flash attention, no
// repacked weights: what is compared is the model, not the kernels' rounding.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "llama.h"

template <typename T> static std::vector<T> read_all(const char * path) {
    std::ifstream file(path, std::ios::binary);
    std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    const T * data = reinterpret_cast<const T *>(bytes.data());
    return std::vector<T>(data, data + bytes.size() / sizeof(T));
}

template <typename T> static void write_all(const char * path, const std::vector<T> & values) {
    std::ofstream(path, std::ios::binary).write(reinterpret_cast<const char *>(values.data()), values.size() * sizeof(T));
}

static void fail(const char * what) {
    std::fprintf(stderr, "%s\n", what);
    std::exit(1);
}

int main(int argc, char ** argv) {
    if (argc != 6 && argc != 8) fail("usage: llama_cpp_probe MODEL TOKENS LOGITS GREEDY N [TEXT IDS]");
    llama_backend_init();
    llama_model_params settings = llama_model_default_params();
    settings.use_extra_bufts = false;
    llama_model * model = llama_model_load_from_file(argv[1], settings);
    if (model == nullptr) fail("the model does not load");
    const llama_vocab * vocab = llama_model_get_vocab(model);
    const int width = llama_vocab_n_tokens(vocab), wanted = std::atoi(argv[5]);
    std::vector<llama_token> tokens = read_all<llama_token>(argv[2]);

    llama_context_params context = llama_context_default_params();
    context.n_ctx = tokens.size() + wanted + 8;
    context.n_batch = context.n_ubatch = context.n_ctx;
    context.n_threads = context.n_threads_batch = 1;
    context.type_k = context.type_v = GGML_TYPE_F32;
    context.flash_attn_type = LLAMA_FLASH_ATTN_TYPE_DISABLED;
    llama_context * state = llama_init_from_model(model, context);
    if (state == nullptr) fail("no context");

    llama_batch batch = llama_batch_init(tokens.size(), 0, 1);
    batch.n_tokens = tokens.size();
    for (size_t at = 0; at < tokens.size(); at++) {
        batch.token[at] = tokens[at];
        batch.pos[at] = at;
        batch.n_seq_id[at] = 1;
        batch.seq_id[at][0] = 0;
        batch.logits[at] = 1;
    }
    if (llama_decode(state, batch) != 0) fail("the prompt does not decode");
    std::vector<float> logits;
    for (size_t at = 0; at < tokens.size(); at++) {
        const float * row = llama_get_logits_ith(state, at);
        logits.insert(logits.end(), row, row + width);
    }
    write_all(argv[3], logits);

    std::vector<int32_t> written;
    const float * last = logits.data() + (tokens.size() - 1) * width;
    while (true) {
        llama_token next = std::max_element(last, last + width) - last;
        written.push_back(next);
        if ((int) written.size() == wanted) break;
        if (llama_decode(state, llama_batch_get_one(&next, 1)) != 0) fail("a token does not decode");
        last = llama_get_logits_ith(state, -1);
    }
    write_all(argv[4], written);

    if (argc == 8) {
        const std::vector<char> text = read_all<char>(argv[6]);
        std::vector<llama_token> ids(text.size() + 8);
        const int count = llama_tokenize(vocab, text.data(), text.size(), ids.data(), ids.size(), false, true);
        if (count < 0) fail("the text does not tokenize");
        ids.resize(count);
        write_all(argv[7], ids);
    }
    return 0;
}
