import { useSignal } from "@preact/signals";
import { sendJson, type Hit } from "../api";
import { explain } from "../chat/state";
import { composing } from "../chat/composer";
import { Icon } from "../components/icons";
import { HitList, SourcePanel } from "../components/sources";
import { t } from "../i18n";

type Mode = "" | "lexical" | "dense" | "hybrid";

/** Search without a model: what a question would be answered from. */
export function Finder(props: { base: string }) {
  const query = useSignal("");
  const mode = useSignal<Mode>("");
  const hits = useSignal<Hit[] | null>(null);
  const problem = useSignal<string | null>(null);
  const opened = useSignal<Hit | null>(null);
  const find = async (event: Event) => {
    event.preventDefault();
    if (!query.value.trim()) return;
    try {
      const found = await sendJson<{ hits: Hit[] }>(
        "POST",
        `/v1/knowledge_bases/${encodeURIComponent(props.base)}/search`,
        { query: query.value, k: 10, ...(mode.value ? { mode: mode.value } : {}) },
      );
      hits.value = found.hits;
      problem.value = null;
    } catch (error) {
      problem.value = explain(error);
    }
  };
  return (
    <section class="finder">
      <h2>{t("tryRetrieval")}</h2>
      <form class="row" role="search" onSubmit={find}>
        <input
          type="search"
          class="grow"
          aria-label={t("tryRetrieval")}
          placeholder={t("askOrWords")}
          value={query.value}
          onInput={(event) => (query.value = event.currentTarget.value)}
          onKeyDown={(event) => {
            if (event.key === "Enter" && composing(event)) event.preventDefault();
          }}
        />
        <select
          aria-label={t("searchBy")}
          value={mode.value}
          onChange={(event) => (mode.value = event.currentTarget.value as Mode)}
        >
          <option value="">{t("asTheBase")}</option>
          <option value="lexical">{t("lexical")}</option>
          <option value="dense">{t("dense")}</option>
          <option value="hybrid">{t("both")}</option>
        </select>
        <button type="submit" aria-label={t("find")}>
          <Icon name="search" />
        </button>
      </form>
      {problem.value && (
        <div class="problem" role="alert">
          {problem.value}
        </div>
      )}
      {hits.value && !hits.value.length && <p class="note">{t("nothingFound")}</p>}
      {hits.value && <HitList hits={hits.value} onOpen={(hit) => (opened.value = hit)} />}
      {opened.value && (
        <SourcePanel base={props.base} citation={opened.value} onClose={() => (opened.value = null)} />
      )}
    </section>
  );
}
