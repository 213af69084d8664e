// Text to tokens and back, as a tokenizer.json of the tokenizers library says: byte-level BPE (GPT-2,
// Llama 3, Qwen) and the kind that SentencePiece models are converted to (Llama 2, Gemma).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "bpe.h"
#include "json.h"
#include "regex.h"

namespace mx {

// What is searched for: a text, or a regular expression.
class Pattern {
public:
    explicit Pattern(const json::Value& value);  // {"String": ..} or {"Regex": ..}
    explicit Pattern(std::string text) : text_(std::move(text)) {}
    static Pattern regex(std::string_view text);

    struct Piece {
        size_t begin, end;  // bytes
        bool matches;
    };
    // The matches in `text` and what lies between them, in order; none of them is empty.
    std::vector<Piece> split(std::string_view text) const;
    std::string replace(std::string_view text, std::string_view by) const;

private:
    Pattern() = default;

    std::string text_;  // never empty, if there is no regex
    std::shared_ptr<const Regex> regex_;
};

// A part of a text on its way to tokens.
struct Part {
    std::string text;
    bool first;  // it begins where the text does
};

using Normalizer = std::function<std::string(std::string)>;
using Splitter = std::function<void(Part, std::vector<Part>&)>;
using Decoder = std::function<std::vector<std::string>(std::vector<std::string>)>;

class Tokenizer {
public:
    // Throws Error when the document is not a tokenizer, or of a kind that is not read here.
    explicit Tokenizer(const json::Document& document);

    // The tokens of `text`, with the marks, such as BOS, that the tokenizer adds.
    std::vector<uint32_t> encode(std::string_view text, bool marks = true) const;

    // The text of `tokens` without marks; U+FFFD where they are not whole characters.
    std::string decode(const std::vector<uint32_t>& tokens) const;

private:
    // A token that is looked for in the text itself.
    struct Added {
        std::string text;
        uint32_t token;
        bool single_word, lstrip, rstrip;
    };
    struct Found {
        size_t begin, end;
        const Added* added;  // nothing: the text between
    };
    // Finds the leftmost longest of many texts: a trie in one vector.
    class AddedSet {
    public:
        void add(Added added);
        std::vector<Found> split(std::string_view text) const;

    private:
        struct Node {
            uint32_t child, sibling;  // 0: none
            uint32_t added;           // its index + 1, or 0
            char byte;
        };
        const Added* longest(std::string_view text) const;

        std::vector<Added> added_;
        std::vector<Node> nodes_ = {{}};
    };

    void read_added(const json::Value& list);
    void read_template(const json::Value& processor);
    void encode_text(std::string_view text, bool first, std::vector<uint32_t>& tokens) const;

    Bpe bpe_;
    Vocabulary added_vocabulary_;
    std::vector<bool> special_;      // by token
    AddedSet raw_, normalized_;      // looked for before and after normalization
    Normalizer normalize_;
    Splitter split_;
    Decoder decode_;
    std::vector<uint32_t> before_, after_;  // marks
};

// Turns the tokens that follow `prompt` into text one by one; holds back what is no whole character.
class TextStream {
public:
    TextStream(const Tokenizer& tokenizer, std::vector<uint32_t> prompt);
    std::string push(uint32_t token);

private:
    const Tokenizer& tokenizer_;
    std::vector<uint32_t> tokens_;  // those that the next text depends on
    std::string prefix_;            // the text of the first prefix_tokens_ of them
    size_t prefix_tokens_ = 0;
};

}  // namespace mx
