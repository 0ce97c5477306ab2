import { useSignal } from "@preact/signals";
import { sendJson, type Citation, type Hit } from "../api";
import { explain } from "../chat/state";
import { isComposing } from "../chat/composer";
import { Icon } from "../components/icons";
import { HitList, sourceLabel, SourcePanel } from "../components/sources";
import { t } from "../i18n";

type Mode = "" | "lexical" | "dense" | "hybrid";
/** The sentence or table row that answers, on one line as `answer`. */
type Quote = Citation & { answer: string };

/** Search without a model: the sentence that answers, and the passages that a question would be
 * answered from. */
export function Search(props: { knowledgeBase: string }) {
  const query = useSignal("");
  const mode = useSignal<Mode>("");
  const hits = useSignal<Hit[] | null>(null);
  const quote = useSignal<Quote | null>(null);
  const problem = useSignal<string | null>(null);
  const opened = useSignal<Hit | Quote | null>(null);
  const search = async (event: Event) => {
    event.preventDefault();
    if (!query.value.trim()) return;
    try {
      const result = await sendJson<{ hits: Hit[]; quote: Quote | null }>(
        "POST",
        `/v1/knowledge_bases/${encodeURIComponent(props.knowledgeBase)}/search`,
        { query: query.value, k: 10, ...(mode.value ? { mode: mode.value } : {}) },
      );
      hits.value = result.hits;
      quote.value = result.quote;
      problem.value = null;
    } catch (error) {
      problem.value = explain(error);
    }
  };
  return (
    <section class="retrieval-test">
      <h2>{t("testRetrieval")}</h2>
      <form class="row" role="search" onSubmit={search}>
        <input
          type="search"
          class="grow"
          aria-label={t("testRetrieval")}
          placeholder={t("queryHint")}
          value={query.value}
          onInput={(event) => (query.value = event.currentTarget.value)}
          onKeyDown={(event) => {
            if (event.key === "Enter" && isComposing(event)) event.preventDefault();
          }}
        />
        <select
          aria-label={t("searchMode")}
          value={mode.value}
          onChange={(event) => (mode.value = event.currentTarget.value as Mode)}
        >
          <option value="">{t("chatMode")}</option>
          <option value="lexical">{t("lexical")}</option>
          <option value="dense">{t("dense")}</option>
          <option value="hybrid">{t("hybrid")}</option>
        </select>
        <button type="submit" aria-label={t("search")}>
          <Icon name="search" />
        </button>
      </form>
      {problem.value && (
        <div class="problem" role="alert">
          {problem.value}
        </div>
      )}
      {hits.value && !hits.value.length && <p class="note">{t("noResults")}</p>}
      {quote.value && (
        <blockquote class="quote">
          <p>{quote.value.answer}</p>
          <button type="button" class="quiet" onClick={() => (opened.value = quote.value)}>
            {sourceLabel(quote.value)}
          </button>
        </blockquote>
      )}
      {hits.value && <HitList hits={hits.value} onOpen={(hit) => (opened.value = hit)} />}
      {opened.value && (
        <SourcePanel knowledgeBase={props.knowledgeBase} citation={opened.value} onClose={() => (opened.value = null)} />
      )}
    </section>
  );
}
