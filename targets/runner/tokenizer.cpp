#include "tokenizer.h"

#include <algorithm>
#include <array>
#include <unordered_map>

#include "error.h"
#include "unicode.h"

namespace mx {
namespace {

constexpr std::string_view kGpt2 =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";

bool starts_with(std::string_view text, std::string_view with) {
    return text.substr(0, with.size()) == with;
}

[[noreturn]] void unknown(const char* part, std::string_view type, const char* known) {
    unsupported("tokenizer.json has the " + std::string(part) + " " + std::string(type) +
                "; mxrun reads " + known);
}

bool flag(const json::Value& value, std::string_view name, bool otherwise) {
    const auto found = value.find(name);
    return found ? found->boolean() : otherwise;
}

// GPT-2's characters for bytes: printable ones stand for themselves, the others follow U+0100.
const std::array<char32_t, 256>& byte_characters() {
    static const std::array<char32_t, 256> table = [] {
        std::array<char32_t, 256> found{};
        char32_t next = 0x100;
        for (char32_t byte = 0; byte < 256; ++byte) {
            const bool printable = (byte >= 0x21 && byte <= 0x7E) ||
                                   (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
            found[byte] = printable ? byte : next++;
        }
        return found;
    }();
    return table;
}

std::string bytes_to_characters(std::string_view text) {
    std::string out;
    out.reserve(2 * text.size());
    for (const char c : text) append(out, byte_characters()[static_cast<unsigned char>(c)]);
    return out;
}

// The bytes that a token's characters stand for; a token with another character is its own bytes.
std::string characters_to_bytes(const std::string& token) {
    static const std::unordered_map<char32_t, char> table = [] {
        std::unordered_map<char32_t, char> found;
        for (int byte = 0; byte < 256; ++byte) {
            found.emplace(byte_characters()[static_cast<size_t>(byte)], static_cast<char>(byte));
        }
        return found;
    }();
    std::string out;
    for (size_t at = 0; at < token.size();) {
        const auto found = table.find(next_character(token, at));
        if (found == table.end()) return token;
        out += found->second;
    }
    return out;
}

// Normalizers

Normalizer read_normalizer(const json::Value& value) {
    const std::string_view type = value.at("type").string();
    if (type == "Sequence") {
        std::vector<Normalizer> steps;
        value.at("normalizers").each([&](json::Value v) { steps.push_back(read_normalizer(v)); });
        return [steps](std::string text) {
            for (const auto& step : steps) text = step(std::move(text));
            return text;
        };
    }
    if (type == "Prepend") {
        const std::string prefix(value.at("prepend").string());
        return [prefix](std::string text) { return text.empty() ? text : prefix + text; };
    }
    if (type == "Replace") {
        const Pattern pattern(value.at("pattern"));
        const std::string by(value.at("content").string());
        return [pattern, by](const std::string& text) { return pattern.replace(text, by); };
    }
    if (type == "NFC") {
        return [](const std::string& text) { return nfc(text); };
    }
    unknown("normalizer", type, "Sequence, Prepend, Replace and NFC");
}

// Pre-tokenizers

enum class Behavior { kRemoved, kIsolated, kMergedWithPrevious, kMergedWithNext, kContiguous };

Behavior read_behavior(std::string_view name) {
    if (name == "Removed") return Behavior::kRemoved;
    if (name == "Isolated") return Behavior::kIsolated;
    if (name == "MergedWithPrevious") return Behavior::kMergedWithPrevious;
    if (name == "MergedWithNext") return Behavior::kMergedWithNext;
    if (name == "Contiguous") return Behavior::kContiguous;
    unknown("split behavior", name, "Removed, Isolated, MergedWithPrevious, MergedWithNext and Contiguous");
}

// Joins matches to their neighbours, or drops them.
std::vector<Pattern::Piece> arrange(std::vector<Pattern::Piece> pieces, Behavior behavior) {
    std::vector<Pattern::Piece> out;
    const bool backwards = behavior == Behavior::kMergedWithNext;
    if (backwards) std::reverse(pieces.begin(), pieces.end());
    bool previous = false;  // was the one before a match?
    for (const auto& piece : pieces) {
        bool join = false;
        switch (behavior) {
            case Behavior::kRemoved:
                if (piece.matches) continue;
                break;
            case Behavior::kIsolated: break;
            case Behavior::kContiguous: join = piece.matches == previous; break;
            case Behavior::kMergedWithPrevious:
            case Behavior::kMergedWithNext: join = piece.matches && !previous; break;
        }
        previous = piece.matches;
        if (join && !out.empty()) {
            out.back().begin = std::min(out.back().begin, piece.begin);
            out.back().end = std::max(out.back().end, piece.end);
        } else {
            out.push_back(piece);
        }
    }
    if (backwards) std::reverse(out.begin(), out.end());
    return out;
}

void split_part(const Part& part, const Pattern& pattern, Behavior behavior, bool invert,
                std::vector<Part>& out) {
    auto pieces = pattern.split(part.text);
    if (invert) {
        for (auto& piece : pieces) piece.matches = !piece.matches;
    }
    for (const auto& piece : arrange(std::move(pieces), behavior)) {
        out.push_back({part.text.substr(piece.begin, piece.end - piece.begin),
                       part.first && piece.begin == 0});
    }
}

Splitter read_splitter(const json::Value& value) {
    const std::string_view type = value.at("type").string();
    if (type == "Sequence") {
        std::vector<Splitter> steps;
        value.at("pretokenizers").each([&](json::Value v) { steps.push_back(read_splitter(v)); });
        return [steps](Part whole, std::vector<Part>& out) {
            std::vector<Part> parts = {std::move(whole)};
            for (const auto& step : steps) {
                std::vector<Part> next;
                for (auto& part : parts) step(std::move(part), next);
                parts = std::move(next);
            }
            out.insert(out.end(), parts.begin(), parts.end());
        };
    }
    if (type == "ByteLevel") {
        const bool add_space = flag(value, "add_prefix_space", true);
        const bool by_words = flag(value, "use_regex", true);
        const Pattern pattern = Pattern::regex(kGpt2);
        return [=](Part part, std::vector<Part>& out) {
            if (add_space && !starts_with(part.text, " ")) part.text.insert(0, " ");
            const size_t begin = out.size();
            if (by_words) {
                split_part(part, pattern, Behavior::kIsolated, false, out);
            } else {
                out.push_back(std::move(part));
            }
            for (size_t i = begin; i < out.size(); ++i) out[i].text = bytes_to_characters(out[i].text);
        };
    }
    if (type == "Split") {
        const Pattern pattern(value.at("pattern"));
        const Behavior behavior = read_behavior(value.at("behavior").string());
        const bool invert = flag(value, "invert", false);
        return [=](const Part& part, std::vector<Part>& out) {
            split_part(part, pattern, behavior, invert, out);
        };
    }
    if (type == "Digits") {
        const Pattern pattern = Pattern::regex(R"(\p{N})");
        const Behavior behavior = flag(value, "individual_digits", false) ? Behavior::kIsolated
                                                                          : Behavior::kContiguous;
        return [=](const Part& part, std::vector<Part>& out) {
            split_part(part, pattern, behavior, false, out);
        };
    }
    if (type == "Metaspace") {
        const std::string mark(value.at("replacement").string());
        const std::string scheme(value.at("prepend_scheme").string());
        if (scheme != "always" && scheme != "first" && scheme != "never") {
            unknown("prepend_scheme", scheme, "always, first and never");
        }
        if (mark.empty()) value.complain("an empty replacement");
        const bool split = flag(value, "split", true);
        const Pattern space(" "), pattern(mark);
        return [=](Part part, std::vector<Part>& out) {
            part.text = space.replace(part.text, mark);
            const bool wanted = scheme == "always" || (scheme == "first" && part.first);
            if (wanted && !starts_with(part.text, mark)) part.text.insert(0, mark);
            if (split) {
                split_part(part, pattern, Behavior::kMergedWithNext, false, out);
            } else {
                out.push_back(std::move(part));
            }
        };
    }
    unknown("pre_tokenizer", type, "Sequence, ByteLevel, Split, Digits and Metaspace");
}

// Decoders

std::string joined(const std::vector<std::string>& texts) {
    std::string out;
    for (const auto& text : texts) out += text;
    return out;
}

// Whether a token is a byte, such as <0x0A>.
bool is_byte(std::string_view token, char& byte) {
    if (token.size() != 6 || !starts_with(token, "<0x") || token[5] != '>') return false;
    unsigned value = 0;
    for (const char c : token.substr(3, 2)) {
        const char lower = static_cast<char>(c | 0x20);
        if (c >= '0' && c <= '9') {
            value = value << 4 | static_cast<unsigned>(c - '0');
        } else if (lower >= 'a' && lower <= 'f') {
            value = value << 4 | static_cast<unsigned>(lower - 'a' + 10);
        } else {
            return false;
        }
    }
    byte = static_cast<char>(value);
    return true;
}

// Runs of bytes become text; U+FFFD for each byte of one that is none.
std::vector<std::string> join_bytes(const std::vector<std::string>& tokens) {
    std::vector<std::string> out;
    std::string bytes;
    const auto flush = [&] {
        if (bytes.empty()) return;
        if (is_utf8(bytes)) {
            out.push_back(bytes);
        } else {
            out.insert(out.end(), bytes.size(), to_utf8({&kReplacement, 1}));
        }
        bytes.clear();
    };
    for (const auto& token : tokens) {
        char byte = 0;
        if (is_byte(token, byte)) {
            bytes += byte;
        } else {
            flush();
            out.push_back(token);
        }
    }
    flush();
    return out;
}

std::string strip(const std::string& token, const std::string& content, int64_t start, int64_t stop) {
    size_t begin = 0, end = token.size();
    const std::string_view view = token;
    while (start-- > 0 && starts_with(view.substr(begin), content)) begin += content.size();
    while (stop-- > 0 && end >= begin + content.size() &&
           view.substr(end - content.size(), content.size()) == content) {
        end -= content.size();
    }
    return token.substr(begin, end - begin);
}

Decoder for_each_token(std::function<std::string(std::string)> change) {
    return [change](std::vector<std::string> tokens) {
        for (auto& token : tokens) token = change(std::move(token));
        return tokens;
    };
}

Decoder read_decoder(const json::Value& value) {
    const std::string_view type = value.at("type").string();
    if (type == "Sequence") {
        std::vector<Decoder> steps;
        value.at("decoders").each([&](json::Value v) { steps.push_back(read_decoder(v)); });
        return [steps](std::vector<std::string> tokens) {
            for (const auto& step : steps) tokens = step(std::move(tokens));
            return tokens;
        };
    }
    if (type == "ByteLevel") {
        return [](const std::vector<std::string>& tokens) {
            std::string bytes;
            for (const auto& token : tokens) bytes += characters_to_bytes(token);
            return std::vector<std::string>{lossy(bytes)};
        };
    }
    if (type == "ByteFallback") return join_bytes;
    if (type == "Fuse") {
        return [](const std::vector<std::string>& tokens) {
            return std::vector<std::string>{joined(tokens)};
        };
    }
    if (type == "Replace") {
        const Pattern pattern(value.at("pattern"));
        const std::string by(value.at("content").string());
        return for_each_token([=](const std::string& text) { return pattern.replace(text, by); });
    }
    if (type == "Strip") {
        const std::string content(value.at("content").string());
        if (content.empty()) value.complain("Strip of nothing");
        const int64_t start = value.at("start").integer(), stop = value.at("stop").integer();
        return for_each_token([=](const std::string& text) { return strip(text, content, start, stop); });
    }
    if (type == "Metaspace") {
        const Pattern pattern{std::string(value.at("replacement").string())};
        const std::string mark(value.at("replacement").string());
        if (mark.empty()) value.complain("an empty replacement");
        const bool drop = value.at("prepend_scheme").string() != "never";
        return [=](std::vector<std::string> tokens) {
            for (size_t i = 0; i < tokens.size(); ++i) {
                tokens[i] = pattern.replace(tokens[i], i == 0 && drop ? "" : " ");
            }
            return tokens;
        };
    }
    unknown("decoder", type, "Sequence, ByteLevel, ByteFallback, Fuse, Replace, Strip and Metaspace");
}

}  // namespace

Pattern::Pattern(const json::Value& value) {
    if (const auto text = value.find("String")) {
        text_ = text->string();
        if (text_.empty()) value.complain("an empty pattern");
    } else {
        regex_ = std::make_shared<Regex>(value.at("Regex").string());
    }
}

Pattern Pattern::regex(std::string_view text) {
    Pattern pattern;
    pattern.regex_ = std::make_shared<Regex>(text);
    return pattern;
}

std::vector<Pattern::Piece> Pattern::split(std::string_view text) const {
    std::vector<Piece> out;
    size_t done = 0;
    const auto match = [&](size_t begin, size_t end) {
        if (begin > done) out.push_back({done, begin, false});
        out.push_back({begin, end, true});
        done = end;
    };
    if (regex_ == nullptr) {
        for (size_t at = 0; (at = text.find(text_, at)) != std::string_view::npos;) {
            match(at, at + text_.size());
            at += text_.size();
        }
    } else {
        const std::u32string characters = to_characters(text);
        size_t at = 0, byte = 0;  // the same place, in characters and in bytes
        const auto byte_of = [&](size_t character) {
            for (; at < character; ++at) next_character(text, byte);
            return byte;
        };
        for (const auto& found : regex_->find_all(characters)) {
            const size_t begin = byte_of(found.begin);
            match(begin, byte_of(found.end));
        }
    }
    if (done < text.size()) out.push_back({done, text.size(), false});
    return out;
}

std::string Pattern::replace(std::string_view text, std::string_view by) const {
    std::string out;
    out.reserve(text.size());
    for (const auto& piece : split(text)) {
        out += piece.matches ? by : text.substr(piece.begin, piece.end - piece.begin);
    }
    return out;
}

void Tokenizer::AddedSet::add(Added added) {
    uint32_t at = 0;
    for (const char byte : added.text) {
        uint32_t child = nodes_[at].child;
        while (child != 0 && nodes_[child].byte != byte) child = nodes_[child].sibling;
        if (child == 0) {
            child = static_cast<uint32_t>(nodes_.size());
            nodes_.push_back({0, nodes_[at].child, 0, byte});
            nodes_[at].child = child;
        }
        at = child;
    }
    added_.push_back(std::move(added));
    nodes_[at].added = static_cast<uint32_t>(added_.size());
}

const Tokenizer::Added* Tokenizer::AddedSet::longest(std::string_view text) const {
    const Added* best = nullptr;
    uint32_t at = 0;
    for (const char byte : text) {
        at = nodes_[at].child;
        while (at != 0 && nodes_[at].byte != byte) at = nodes_[at].sibling;
        if (at == 0) break;
        if (nodes_[at].added != 0) best = &added_[nodes_[at].added - 1];
    }
    return best;
}

std::vector<Tokenizer::Found> Tokenizer::AddedSet::split(std::string_view text) const {
    std::vector<Found> out;
    const auto word_before = [&](size_t at) {
        while (at-- > 0) {
            if ((static_cast<unsigned char>(text[at]) & 0xC0) != 0x80) return is_word(next_character(text, at));
        }
        return false;
    };
    size_t done = 0;
    for (size_t at = 0; at < text.size();) {
        const Added* found = longest(text.substr(at));
        if (found == nullptr) {
            ++at;
            continue;
        }
        size_t begin = at, end = at + found->text.size();
        at = end;
        size_t after = end;
        if (found->single_word &&
            (word_before(begin) || (end < text.size() && is_word(next_character(text, after))))) {
            continue;
        }
        if (found->lstrip) {
            for (size_t back = begin; back > done;) {
                do --back;
                while (back > done && (static_cast<unsigned char>(text[back]) & 0xC0) == 0x80);
                size_t next = back;
                if (!is_space(next_character(text, next))) break;
                begin = back;
            }
        }
        if (found->rstrip) {
            for (size_t next = end; next < text.size();) {
                if (!is_space(next_character(text, next))) break;
                end = next;
            }
        }
        if (begin > done) out.push_back({done, begin, nullptr});
        out.push_back({begin, end, found});
        done = end;
        at = std::max(at, end);
    }
    if (done < text.size()) out.push_back({done, text.size(), nullptr});
    return out;
}

Tokenizer::Tokenizer(const json::Document& document) : bpe_(document.root().at("model")) {
    const json::Value root = document.root();
    if (const auto found = root.find("normalizer")) normalize_ = read_normalizer(*found);
    if (const auto found = root.find("pre_tokenizer")) split_ = read_splitter(*found);
    if (const auto found = root.find("decoder")) decode_ = read_decoder(*found);
    if (const auto found = root.find("post_processor")) read_template(*found);
    if (const auto found = root.find("added_tokens")) read_added(*found);
}

void Tokenizer::read_added(const json::Value& list) {
    list.each([this](json::Value value) {
        Added added = {std::string(value.at("content").string()), value.at("id").token(),
                       flag(value, "single_word", false), flag(value, "lstrip", false),
                       flag(value, "rstrip", false)};
        if (added.text.empty()) return;
        const bool special = flag(value, "special", false);
        added_vocabulary_.add(added.text, added.token);
        if (special) {
            if (added.token >= special_.size()) special_.resize(added.token + 1);
            special_[added.token] = true;
        }
        if (flag(value, "normalized", !special)) {
            if (normalize_) added.text = normalize_(added.text);
            if (!added.text.empty()) normalized_.add(std::move(added));
        } else {
            raw_.add(std::move(added));
        }
    });
}

void Tokenizer::read_template(const json::Value& processor) {
    const std::string_view type = processor.at("type").string();
    if (type == "ByteLevel") return;  // corrects places in the text, which nobody asks for here
    if (type == "Sequence") {
        processor.at("processors").each([this](json::Value value) { read_template(value); });
        return;
    }
    if (type != "TemplateProcessing") {
        unknown("post_processor", type, "Sequence, ByteLevel and TemplateProcessing");
    }
    const json::Value known = processor.at("special_tokens");
    bool text_seen = false;
    std::vector<uint32_t> before, after;
    processor.at("single").each([&](json::Value item) {
        if (item.find("Sequence")) {
            if (text_seen) item.complain("a template with the text twice");
            text_seen = true;
            return;
        }
        const std::string_view name = item.at("SpecialToken").at("id").string();
        known.at(name).at("ids").each([&](json::Value token) {
            (text_seen ? after : before).push_back(token.token());
        });
    });
    if (!text_seen) processor.complain("a template without the text");
    before_.insert(before_.begin(), before.begin(), before.end());
    after_.insert(after_.end(), after.begin(), after.end());
}

std::vector<uint32_t> Tokenizer::encode(std::string_view text, bool marks) const {
    std::vector<uint32_t> tokens;
    if (marks) tokens = before_;
    for (const Found& raw : raw_.split(text)) {
        if (raw.added != nullptr) {
            tokens.push_back(raw.added->token);
            continue;
        }
        std::string part(text.substr(raw.begin, raw.end - raw.begin));
        if (normalize_) part = normalize_(std::move(part));
        for (const Found& found : normalized_.split(part)) {
            if (found.added != nullptr) {
                tokens.push_back(found.added->token);
            } else {
                const bool first = raw.begin == 0 && found.begin == 0;
                encode_text(std::string_view(part).substr(found.begin, found.end - found.begin),
                            first, tokens);
            }
        }
    }
    if (marks) tokens.insert(tokens.end(), after_.begin(), after_.end());
    return tokens;
}

void Tokenizer::encode_text(std::string_view text, bool first, std::vector<uint32_t>& tokens) const {
    if (!split_) return bpe_.encode(text, tokens);
    std::vector<Part> parts;
    split_({std::string(text), first}, parts);
    for (const Part& part : parts) bpe_.encode(part.text, tokens);
}

std::string Tokenizer::decode(const std::vector<uint32_t>& tokens) const {
    std::vector<std::string> texts;
    for (const uint32_t token : tokens) {
        if (token < special_.size() && special_[token]) continue;
        auto text = added_vocabulary_.text(token);
        if (!text) text = bpe_.vocabulary().text(token);
        if (text) texts.emplace_back(*text);
    }
    if (decode_) return joined(decode_(std::move(texts)));
    std::string out;
    for (const auto& text : texts) out += text + " ";
    if (!out.empty()) out.pop_back();
    return out;
}

TextStream::TextStream(const Tokenizer& tokenizer, std::vector<uint32_t> prompt)
    : tokenizer_(tokenizer), tokens_(std::move(prompt)) {}

namespace {

// Whether `text` may go on as another character than the one it ends with.
bool is_open(std::string_view text) {
    constexpr std::string_view kMark = "\xEF\xBF\xBD";  // U+FFFD
    return text.size() >= kMark.size() && text.substr(text.size() - kMark.size()) == kMark;
}

}  // namespace

// Decodes a window of tokens, since what a token's text is may depend on those before it.
std::string TextStream::push(uint32_t token) {
    if (prefix_.empty() && !tokens_.empty()) {
        std::string text = tokenizer_.decode(tokens_);
        if (!is_open(text)) {
            prefix_ = std::move(text);
            prefix_tokens_ = tokens_.size();
        }
    }
    tokens_.push_back(token);
    const std::string text = tokenizer_.decode(tokens_);
    if (text.size() <= prefix_.size() || is_open(text)) return {};
    std::string fresh = text.substr(prefix_.size());
    tokens_.erase(tokens_.begin(), tokens_.begin() + static_cast<ptrdiff_t>(prefix_tokens_));
    prefix_tokens_ = tokens_.size();
    prefix_ = tokenizer_.decode(tokens_);
    return fresh;
}

}  // namespace mx
