#include "regex.h"

#include <charconv>
#include <optional>

#include "error.h"
#include "unicode.h"

namespace mx {
namespace {

constexpr uint32_t kUnbounded = UINT32_MAX;
constexpr int kDepth = 32;             // of groups
constexpr size_t kInstructions = 1 << 14;

}  // namespace

// Reads a pattern by recursive descent and emits instructions as it goes.
class RegexCompiler {
public:
    RegexCompiler(std::string_view pattern, Regex& out)
        : pattern_(pattern), text_(to_characters(pattern)), out_(out) {}

    void run() {
        alternatives(0);
        if (at_ != text_.size()) refuse("an unmatched )");
        emit(Op::kEnd);
    }

private:
    using Op = Regex::Op;
    using Greed = Regex::Greed;
    using Set = Regex::Set;
    using Item = Set::Item;
    using Kind = Item::Kind;

    [[noreturn]] void refuse(const std::string& what) const {
        unsupported("the pattern " + std::string(pattern_.substr(0, 200)) + " has " + what +
                    ", which mxrun does not read");
    }

    bool more() const { return at_ < text_.size(); }
    char32_t peek(size_t ahead = 0) const {
        return at_ + ahead < text_.size() ? text_[at_ + ahead] : U'\0';
    }
    char32_t take() {
        if (!more()) refuse("no end");
        return text_[at_++];
    }
    bool take(std::u32string_view word) {
        if (std::u32string_view(text_).substr(at_, word.size()) != word) return false;
        at_ += word.size();
        return true;
    }

    uint32_t here() const { return static_cast<uint32_t>(out_.program_.size()); }

    uint32_t emit(Op op, uint32_t a = 0, uint32_t b = 0, Greed greed = Greed::kGreedy) {
        if (out_.program_.size() >= kInstructions) refuse("too much in it");
        out_.program_.push_back({op, greed, a, b});
        return here() - 1;
    }

    // Makes room for an instruction before those from `begin` on.
    void insert(uint32_t begin, Regex::Instruction instruction) {
        emit(Op::kJump);
        auto& program = out_.program_;
        for (uint32_t i = here() - 1; i > begin; --i) program[i] = program[i - 1];
        for (uint32_t i = begin + 1; i < here(); ++i) shift(program[i], begin, 1);
        program[begin] = instruction;
    }

    // Adjusts where an instruction that was moved by `by` leads to.
    static void shift(Regex::Instruction& moved, uint32_t from, uint32_t by) {
        const bool leads = moved.op == Op::kSplit || moved.op == Op::kJump ||
                           moved.op == Op::kLook || moved.op == Op::kAtomic;
        if (leads && moved.a >= from) moved.a += by;
        if (moved.op == Op::kSplit && moved.b >= from) moved.b += by;
    }

    // Gives whether what was read can match nothing.
    bool alternatives(int depth) {
        if (depth > kDepth) refuse("groups too deep");
        bool empty = false;
        std::vector<uint32_t> jumps;
        for (;;) {
            const uint32_t begin = here();
            empty = sequence(depth) || empty;
            if (!take(U"|")) break;
            insert(begin, {Op::kSplit, Greed::kGreedy, begin + 1, here() + 2});
            jumps.push_back(emit(Op::kJump));
        }
        for (uint32_t jump : jumps) out_.program_[jump].a = here();
        return empty;
    }

    bool sequence(int depth) {
        bool empty = true;
        while (more() && peek() != U'|' && peek() != U')') {
            const uint32_t begin = here();
            const bool item_empty = item(depth);
            empty = repeats(begin, item_empty) && empty;
        }
        return empty;
    }

    bool item(int depth) {
        const char32_t c = take();
        switch (c) {
            case U'(': return group(depth);
            case U'[': return one(bracket());
            case U'.': return one({{{Kind::kRange, false, U'\n', U'\n'}}, true});
            case U'^': emit(Op::kLineStart); return true;
            case U'$': emit(Op::kLineEnd); return true;
            case U'\\': return one({{escape()}});
            case U'*': case U'+': case U'?': refuse("a repeat of nothing");
            default: return one(literal(c));
        }
    }

    bool group(int depth) {
        const bool outer = ignore_case_;
        bool empty = false;
        if (take(U"?:")) {
            empty = alternatives(depth + 1);
        } else if (take(U"?i:")) {
            ignore_case_ = true;
            empty = alternatives(depth + 1);
        } else if (take(U"?=") || take(U"?!") || take(U"?>")) {
            const char32_t kind = text_[at_ - 1];
            const uint32_t open = emit(kind == U'>' ? Op::kAtomic : Op::kLook, 0, kind == U'!');
            empty = alternatives(depth + 1) || kind != U'>';
            emit(Op::kEnd);
            out_.program_[open].a = here();
        } else if (peek() == U'?') {
            refuse("a group of a kind");
        } else {
            empty = alternatives(depth + 1);
        }
        ignore_case_ = outer;
        if (!take(U")")) refuse("no ) for a (");
        return empty;
    }

    bool one(Set set) {
        out_.sets_.push_back(std::move(set));
        emit(Op::kSet, static_cast<uint32_t>(out_.sets_.size() - 1));
        return false;
    }

    Set literal(char32_t c) const {
        Set set;
        add_range(set, c, c);
        return set;
    }

    // In (?i:...) ASCII letters also stand for the other case and for the two characters beyond
    // ASCII that fold to one: the long s and the Kelvin sign.
    void add_range(Set& set, char32_t low, char32_t high) const {
        set.items.push_back({Kind::kRange, false, low, high});
        if (!ignore_case_) return;
        if (high >= 0x80) refuse("letters beyond ASCII in (?i:...)");
        for (char32_t c = low; c <= high; ++c) {
            const char32_t lower = c | 0x20;
            if (lower < U'a' || lower > U'z') continue;
            set.items.push_back({Kind::kRange, false, c ^ 0x20, c ^ 0x20});
            if (lower == U's') set.items.push_back({Kind::kRange, false, 0x17F, 0x17F});
            if (lower == U'k') set.items.push_back({Kind::kRange, false, 0x212A, 0x212A});
        }
    }

    // Behind a backslash. A single character becomes a range.
    Item escape() {
        const char32_t c = take();
        switch (c) {
            case U's': case U'S': return {Kind::kSpace, c == U'S', 0, 0};
            case U'w': case U'W': return {Kind::kWord, c == U'W', 0, 0};
            case U'd': case U'D': return {Kind::kCategories, c == U'D', category_mask("Nd"), 0};
            case U'p': case U'P': return property(c == U'P');
            case U'n': return single(U'\n');
            case U'r': return single(U'\r');
            case U't': return single(U'\t');
            case U'f': return single(U'\f');
            case U'v': return single(U'\v');
            case U'x': return single(peek() == U'{' ? braced() : hex(2));
            case U'u': return single(hex(4));
            default: break;
        }
        if (c >= 0x80 || (c >= U'0' && c <= U'9') || (c | 0x20) - U'a' < 26) {
            refuse("an escape \\" + to_utf8({&c, 1}));
        }
        return single(c);
    }

    static Item single(char32_t c) { return {Kind::kRange, false, c, c}; }

    char32_t hex(size_t digits) {
        uint32_t found = 0;
        while (digits-- != 0) {
            const char32_t c = take();
            const char digit = c < 0x80 ? static_cast<char>(c) : 'z';
            uint32_t value = 0;
            if (std::from_chars(&digit, &digit + 1, value, 16).ec != std::errc()) {
                refuse("an escape that is not hexadecimal");
            }
            found = found << 4 | value;
        }
        return found;
    }

    char32_t braced() {
        take();
        size_t digits = 0;
        while (peek(digits) != U'}' && digits < 7) ++digits;
        if (digits == 0 || digits > 6) refuse("an escape \\x{..}");
        const char32_t found = hex(digits);
        take();
        return found;
    }

    Item property(bool negated) {
        if (take() != U'{') refuse("\\p without {");
        std::string name;
        while (peek() != U'}') append(name, take());
        take();
        if (!name.empty() && name[0] == '^') {
            negated = !negated;
            name.erase(0, 1);
        }
        const uint32_t mask = category_mask(name);
        if (mask == 0) refuse("\\p{" + name + "}");
        return {Kind::kCategories, negated, mask, 0};
    }

    Set bracket() {
        Set set;
        set.negated = take(U"^");
        for (bool first = true; first || peek() != U']'; first = false) {
            if (peek() == U'[') refuse("a class within a class");
            if (take(U"&&")) refuse("an intersection of classes");
            const Item low = class_item();
            if (low.kind != Kind::kRange) {
                set.items.push_back(low);
                continue;
            }
            if (peek() != U'-' || peek(1) == U']') {
                add_range(set, low.low, low.low);
                continue;
            }
            take();
            const Item high = class_item();
            if (high.kind != Kind::kRange || high.low < low.low) refuse("a range that is none");
            add_range(set, low.low, high.low);
        }
        take();
        return set;
    }

    Item class_item() {
        const char32_t c = take();
        return c == U'\\' ? escape() : single(c);
    }

    bool repeats(uint32_t begin, bool empty) {
        for (;;) {
            uint32_t low = 0, high = kUnbounded;
            bool braces = false;
            if (take(U"*")) {
            } else if (take(U"+")) {
                low = 1;
            } else if (take(U"?")) {
                high = 1;
            } else if (counts(low, high)) {
                braces = true;
            } else {
                return empty;
            }
            Greed greed = Greed::kGreedy;
            if (take(U"?")) {
                greed = Greed::kLazy;
            } else if (!braces && take(U"+")) {  // {n,m}+ is a repeat of a repeat to Oniguruma
                greed = Greed::kPossessive;
            }
            repeat(begin, low, high, greed, empty);
            empty = empty || low == 0;
        }
    }

    // Reads {n}, {n,}, {,m} or {n,m}; a brace that begins none is a character like others.
    bool counts(uint32_t& low, uint32_t& high) {
        if (peek() != U'{') return false;
        const size_t start = at_++;
        const auto number = [this]() -> std::optional<uint32_t> {
            std::optional<uint32_t> found;
            while (peek() >= U'0' && peek() <= U'9' && found.value_or(0) < 10000) {
                found = found.value_or(0) * 10 + (take() - U'0');
            }
            return found;
        };
        const auto least = number();
        auto most = least;
        if (take(U",")) {
            most = number();
            if (!least && !most) return at_ = start, false;
            low = least.value_or(0);
            high = most.value_or(kUnbounded);
        } else {
            if (!least) return at_ = start, false;
            low = high = *least;
        }
        if (!take(U"}")) return at_ = start, false;
        if (low > high || low > 1000 || (high > 1000 && high != kUnbounded)) refuse("such counts");
        return true;
    }

    void repeat(uint32_t begin, uint32_t low, uint32_t high, Greed greed, bool empty) {
        const uint32_t size = here() - begin;
        if (size == 1 && out_.program_[begin].op == Op::kSet) {
            insert(begin, {Op::kRepeat, greed, low, high});
            return;
        }
        if (high == kUnbounded && empty) refuse("a repeat of what can be empty");
        const std::vector<Regex::Instruction> body(out_.program_.begin() + begin,
                                                   out_.program_.end());
        out_.program_.resize(begin);
        uint32_t atomic = 0;
        if (greed == Greed::kPossessive) atomic = emit(Op::kAtomic);
        const auto copy = [&] {
            const uint32_t by = here() - begin;
            for (Regex::Instruction instruction : body) {
                shift(instruction, begin, by);
                out_.program_.push_back(instruction);
                if (here() > kInstructions) refuse("too much in it");
            }
        };
        for (uint32_t i = 0; i < low; ++i) copy();
        std::vector<uint32_t> exits;
        const auto choice = [&](uint32_t split) {
            auto& instruction = out_.program_[split];
            instruction.a = split + 1;
            instruction.b = here();
            if (greed == Greed::kLazy) std::swap(instruction.a, instruction.b);
        };
        if (high == kUnbounded) {
            const uint32_t split = emit(Op::kSplit);
            copy();
            emit(Op::kJump, split);
            exits.push_back(split);
        } else {
            for (uint32_t i = low; i < high; ++i) {
                exits.push_back(emit(Op::kSplit));
                copy();
            }
        }
        for (uint32_t split : exits) choice(split);
        if (greed == Greed::kPossessive) {
            emit(Op::kEnd);
            out_.program_[atomic].a = here();
        }
    }

    std::string_view pattern_;
    std::u32string text_;
    Regex& out_;
    size_t at_ = 0;
    bool ignore_case_ = false;
};

bool Regex::Set::contains(char32_t c) const {
    for (const Item& item : items) {
        bool found = false;
        switch (item.kind) {
            case Item::Kind::kRange: found = c >= item.low && c <= item.high; break;
            case Item::Kind::kCategories: found = is_in(c, item.low); break;
            case Item::Kind::kSpace: found = is_space(c); break;
            case Item::Kind::kWord: found = is_word(c); break;
        }
        if (found != item.negated) return !negated;
    }
    return negated;
}

// Matches by backtracking, with the choices on a stack of its own.
class RegexMatcher {
public:
    RegexMatcher(const Regex& regex, std::u32string_view text)
        : regex_(regex), text_(text), budget_(100000 + 1000 * text.size()) {}

    // Where the match of the instructions from `pc` on, at `at`, ends.
    std::optional<size_t> match(uint32_t pc, size_t at) {
        const size_t bottom = choices_.size();
        choices_.push_back({pc, at, at});
        while (choices_.size() > bottom) {
            Choice& top = choices_.back();
            pc = top.pc;
            at = top.at;
            if (top.at == top.last) {
                choices_.pop_back();
            } else {  // the rest of a repeat: greedy ones give back, lazy ones take more
                top.at = top.at > top.last ? top.at - 1 : top.at + 1;
            }
            if (const auto end = run(pc, at)) {
                choices_.resize(bottom);
                return end;
            }
        }
        return std::nullopt;
    }

private:
    using Op = Regex::Op;

    // To go on at `pc` with each place from `at` to `last`.
    struct Choice {
        uint32_t pc;
        size_t at, last;
    };

    // Goes on until the end or a mismatch; what is left to try goes on the stack.
    std::optional<size_t> run(uint32_t pc, size_t at) {
        for (;;) {
            spend(1);
            const Regex::Instruction& step = regex_.program_[pc];
            switch (step.op) {
                case Op::kEnd: return at;
                case Op::kJump: pc = step.a; break;
                case Op::kSplit:
                    choices_.push_back({step.b, at, at});
                    pc = step.a;
                    break;
                case Op::kSet:
                    if (at >= text_.size() || !regex_.sets_[step.a].contains(text_[at])) return {};
                    ++at, ++pc;
                    break;
                case Op::kRepeat:
                    if (!repeat(step, pc, at)) return {};
                    pc += 2;
                    break;
                case Op::kLook:
                    if (match(pc + 1, at).has_value() == (step.b != 0)) return {};
                    pc = step.a;
                    break;
                case Op::kAtomic: {
                    const auto end = match(pc + 1, at);
                    if (!end) return {};
                    at = *end;
                    pc = step.a;
                    break;
                }
                case Op::kLineStart:
                    if (at != 0 && text_[at - 1] != U'\n') return {};
                    ++pc;
                    break;
                case Op::kLineEnd:
                    if (at != text_.size() && text_[at] != U'\n') return {};
                    ++pc;
                    break;
            }
        }
    }

    bool repeat(const Regex::Instruction& step, uint32_t pc, size_t& at) {
        const Regex::Set& set = regex_.sets_[regex_.program_[pc + 1].a];
        const size_t begin = at;
        while (at - begin < step.b && at < text_.size() && set.contains(text_[at])) ++at;
        spend(at - begin);
        if (at - begin < step.a) return false;
        const size_t least = begin + step.a;
        if (at == least || step.greed == Regex::Greed::kPossessive) return true;
        if (step.greed == Regex::Greed::kGreedy) {
            choices_.push_back({pc + 2, at - 1, least});
        } else {
            choices_.push_back({pc + 2, least + 1, at});
            at = least;
        }
        return true;
    }

    void spend(size_t steps) {
        if (steps > budget_) unsupported("a pattern of tokenizer.json takes too long on this text");
        budget_ -= steps;
    }

    const Regex& regex_;
    std::u32string_view text_;
    size_t budget_;
    std::vector<Choice> choices_;
};

Regex::Regex(std::string_view pattern) { RegexCompiler(pattern, *this).run(); }

std::vector<Regex::Match> Regex::find_all(std::u32string_view text) const {
    std::vector<Match> found;
    RegexMatcher matcher(*this, text);
    for (size_t at = 0; at < text.size();) {
        const auto end = matcher.match(0, at);
        if (end && *end > at) {
            found.push_back({at, *end});
            at = *end;
        } else {
            ++at;
        }
    }
    return found;
}

}  // namespace mx
