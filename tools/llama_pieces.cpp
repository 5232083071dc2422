// What llama.cpp makes of many texts, for tools/pieces.py.  Built against a static build of llama.cpp in $L/build; the
// linker lets us in between the tokenizer and its splitting of texts:
//
//   g++ -O2 -std=c++17 -I$L/include -I$L/ggml/include -I$L/src tools/llama_pieces.cpp -o llama_pieces
//       -Wl,--wrap=_Z19unicode_regex_splitRKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEERKSt6vectorIS4_SaIS4_EEb
//       $L/build/src/libllama.a $L/build/ggml/src/libggml.a $L/build/ggml/src/libggml-cpu.a
//       $L/build/ggml/src/libggml-base.a -lm -ldl -lgomp -lpthread
//
// llama_pieces VOCABULARY.gguf: from stdin texts (uint32 length, bytes), to stdout first whether a BOS is added (uint32),
// then for each text the words before the merging (uint32 count; each uint32 length, bytes) and the tokens, special
// ones read as text and then as tokens (uint32 count, int32 tokens).
// llama_pieces: to stdout the category of every code point (uint16: 1 none, 2 N, 4 L, 16 M, 32 P, 64 S, 256 blank).
#include <cstdint>
#include <cstdio>
#include <string>
#include <vector>

#include "llama.h"
#include "unicode.h"

typedef std::vector<std::string> words;
static words found;

#define JOINED(a, b) JOINED_(a, b)
#define JOINED_(a, b) a##b
#define SPLIT _Z19unicode_regex_splitRKNSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEERKSt6vectorIS4_SaIS4_EEb
extern "C" words JOINED(__real_, SPLIT)(const std::string &, const words &, bool);
extern "C" words JOINED(__wrap_, SPLIT)(const std::string &text, const words &expressions, bool byte_encode) {
    words w = JOINED(__real_, SPLIT)(text, expressions, byte_encode);
    found.insert(found.end(), w.begin(), w.end());
    return w;
}

static void put(uint32_t value) { fwrite(&value, 4, 1, stdout); }

static void print_categories() {
    for (uint32_t c = 0; c < 0x110000; c++) {
        const uint16_t flags = unicode_cpt_flags_from_cpt(c).as_uint();
        fwrite(&flags, 2, 1, stdout);
    }
}

static void print_tokens(const llama_vocab *vocab, const std::string &text, bool special) {
    std::vector<llama_token> tokens(text.size() + 16);
    const int count = llama_tokenize(vocab, text.data(), text.size(), tokens.data(), tokens.size(), false, special);
    put(count);
    fwrite(tokens.data(), 4, count, stdout);
}

int main(int count, char **arguments) {
    if (count < 2) return print_categories(), 0;
    llama_log_set([](ggml_log_level level, const char *text, void *) {
        if (level >= GGML_LOG_LEVEL_ERROR) fputs(text, stderr);
    }, nullptr);
    llama_backend_init();
    llama_model_params params = llama_model_default_params();
    params.vocab_only = true;
    llama_model *model = llama_model_load_from_file(arguments[1], params);
    if (!model) return 1;
    const llama_vocab *vocab = llama_model_get_vocab(model);
    put(llama_vocab_get_add_bos(vocab));
    std::string text;
    for (uint32_t length; fread(&length, 4, 1, stdin) == 1;) {
        text.resize(length);
        if (fread(&text[0], 1, length, stdin) != length) return 2;
        found.clear();
        llama_tokenize(vocab, text.data(), length, nullptr, 0, false, false);
        put(found.size());
        for (const std::string &word : found) {
            put(word.size());
            fwrite(word.data(), 1, word.size(), stdout);
        }
        print_tokens(vocab, text, false);
        print_tokens(vocab, text, true);
    }
    return 0;
}
